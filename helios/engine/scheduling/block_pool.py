"""The blocks of the paged KV: who holds which, and which keep the beginning of a text that may come again."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from helios.errors import OutOfMemoryError


class BlockPool:
    """Hands out block numbers. A block may have several holders; each frees it exactly once.

    A full block can be published under the digest of all tokens up to its end (`Sequence.digests`). Others
    may then read it. When nobody holds it any more it keeps its content until its place is needed: the block
    that was freed longest ago goes first (as in vLLM, Kwon et al. 2023).
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._holders = [0] * num_blocks
        # Blocks that nobody holds: those with nothing worth keeping, and the published ones, the one freed
        # longest ago first.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._published: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._kept)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks. Raises OutOfMemoryError, and takes none, when fewer are free."""
        if count > self.free_blocks:
            raise OutOfMemoryError(f"{count} KV blocks asked, {self.free_blocks} of {self.num_blocks} free")
        return [self._take_one() for _ in range(count)]

    def grow(self, num_blocks: int) -> None:
        """Adds blocks until there are `num_blocks`; those handed out stay as they are."""
        self._empty.extend(range(num_blocks - 1, self.num_blocks - 1, -1))
        self._holders += [0] * (num_blocks - self.num_blocks)
        self.num_blocks = num_blocks

    def renew(self, num_blocks: int) -> None:
        """Withdraws all that is published and changes the number of blocks. All held blocks must remain."""
        self._published.clear()
        self._digest_of.clear()
        self._kept.clear()
        added = [0] * (num_blocks - self.num_blocks)
        self._holders = (self._holders + added)[:num_blocks]
        self._empty = [block for block in range(num_blocks - 1, -1, -1) if not self._holders[block]]
        self.num_blocks = num_blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Gives blocks back. Raises ValueError for a block that is not held."""
        # The end of a text goes first: its beginning may serve other texts.
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
        """Lets a full block be found by its digest, unless another block is. Nobody may write to it again."""
        if digest not in self._published:
            self._published[digest] = block
            self._digest_of[block] = digest

    def reuse(self, digests: Iterable[bytes]) -> list[int]:
        """Holds the published blocks of the longest beginning of these digests."""
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
