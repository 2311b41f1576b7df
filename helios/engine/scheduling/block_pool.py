"""The blocks of the paged KV cache: who holds each block, and which blocks keep prefixes for reuse."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from helios.errors import OutOfMemoryError


class BlockPool:
    """Hands out block numbers. A block may have several holders; each frees it exactly once.

    A full block can be published under the digest of all tokens up to its end (`Sequence.digests`), so that
    others may read it. Once nobody holds it, it keeps its content until its place is needed. The block freed
    longest ago is reused first (as in vLLM, Kwon et al. 2023).
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._holders = [0] * num_blocks
        # Blocks that nobody holds: first those without useful content, then the published ones in the order
        # in which they were freed.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._published: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free_blocks(self) -> int:
        """Number of blocks that nobody holds."""
        return len(self._empty) + len(self._kept)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks needed for this many tokens."""
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks. Raises OutOfMemoryError and takes none if fewer are free."""
        if count > self.free_blocks:
            raise OutOfMemoryError(f"{count} KV blocks asked, {self.free_blocks} of {self.num_blocks} free")
        return [self._take_one() for _ in range(count)]

    def grow(self, num_blocks: int) -> None:
        """Adds blocks until there are `num_blocks`. Blocks in use do not change."""
        self._empty.extend(range(num_blocks - 1, self.num_blocks - 1, -1))
        self._holders += [0] * (num_blocks - self.num_blocks)
        self.num_blocks = num_blocks

    def renew(self, num_blocks: int) -> None:
        """Unpublishes all blocks and changes their number. Blocks in use must keep valid numbers."""
        self._published.clear()
        self._digest_of.clear()
        self._kept.clear()
        added = [0] * (num_blocks - self.num_blocks)
        self._holders = (self._holders + added)[:num_blocks]
        self._empty = [block for block in range(num_blocks - 1, -1, -1) if not self._holders[block]]
        self.num_blocks = num_blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Returns blocks to the pool. Raises ValueError for a block that is not held."""
        # The last block of a text is reused first, because the first blocks are a prefix for other texts.
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"KV block {block} is freed but was not held")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._digest_of:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Publishes a full block under its digest, unless another has it. Nobody may write to it again."""
        if digest not in self._published:
            self._published[digest] = block
            self._digest_of[block] = digest

    def reuse(self, digests: Iterable[bytes]) -> list[int]:
        """Takes hold of the published blocks that match the longest prefix of these digests."""
        found = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            if not self._holders[block]:
                del self._kept[block]
            self._holders[block] += 1
            found.append(block)
        return found

    def _take_one(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._published[self._digest_of.pop(block)]
        self._holders[block] = 1
        return block
