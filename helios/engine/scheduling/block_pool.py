"""The blocks of the paged KV cache: who holds each block, and which blocks keep prefixes for reuse."""

import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from helios.errors import OutOfMemoryError


@dataclass(slots=True)
class _FreeBlocks:
    """Blocks with equally many layers that nobody holds."""

    # Blocks without useful content.
    empty: list[int] = field(default_factory=list)
    # Published blocks in the order in which they were freed, with the number of that event.
    kept: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.empty) + len(self.kept)


class BlockPool:
    """Hands out block numbers. A block may have several holders; each frees it exactly once.

    A full block can be published under the digest of all tokens up to its end (`Sequence.digests`), so that
    others may read it. Once nobody holds it, it keeps its content until its place is needed. The block freed
    longest ago is reused first (as in vLLM, Kwon et al. 2023).

    After `resize`, blocks may differ in their number of layers: each layer has the first of them, and no more
    than the layer before it. A sequence takes blocks that deeper ones cannot use before others.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        """All blocks have as many layers as any sequence needs."""
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # Number of blocks of each layer. Empty: each layer has all blocks.
        self._layer_blocks: Sequence[int] = ()
        self._holders = [0] * num_blocks
        # Free blocks by their number of layers, those with the most layers first. `_ends` are the numbers
        # at which these ranges of blocks end.
        self._free = [_FreeBlocks(list(range(num_blocks - 1, -1, -1)))]
        self._ends = [num_blocks]
        self._published: dict[bytes, int] = {}
        # The digest of each published block, and how many of its layers are valid.
        self._content: dict[int, tuple[bytes, int]] = {}
        self._frees = itertools.count()

    @property
    def free_blocks(self) -> int:
        """Number of blocks that nobody holds."""
        return sum(map(len, self._free))

    def free_for(self, depth: int) -> int:
        """Number of blocks with at least `depth` layers that nobody holds."""
        return sum(map(len, self._usable(depth)))

    def limit(self, depth: int) -> int:
        """Blocks with lower numbers than this one have at least `depth` layers."""
        return self._layer_blocks[depth - 1] if self._layer_blocks else self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks needed for this many tokens."""
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int, depth: int = 1) -> list[int]:
        """Takes `count` blocks with at least `depth` layers.

        Raises OutOfMemoryError and takes none if fewer are free.
        """
        if count > (free := self.free_for(depth)):
            raise OutOfMemoryError(f"{count} KV blocks asked, {free} of {self.limit(depth)} free")
        return [self._take_one(depth) for _ in range(count)]

    def resize(self, layer_blocks: Sequence[int]) -> None:
        """Changes the number of blocks of each layer. Each number is at most the one before it.

        Blocks in use must keep as many layers as their holders need. A published block is found only by
        sequences that need no more than the layers that it still has.
        """
        added = layer_blocks[0] - self.num_blocks
        kept = sorted((number, block) for part in self._free for block, number in part.kept.items())
        self.num_blocks, self._layer_blocks = layer_blocks[0], tuple(layer_blocks)
        self._holders = (self._holders + [0] * added)[: self.num_blocks]
        for block, (digest, depth) in list(self._content.items()):
            left = sum(block < count for count in layer_blocks[:depth])
            if left:
                self._content[block] = digest, left
            else:
                del self._published[digest], self._content[block]
        self._ends = sorted(set(layer_blocks))
        self._free = [_FreeBlocks() for _ in self._ends]
        for block in range(self.num_blocks - 1, -1, -1):
            if not self._holders[block] and block not in self._content:
                self._free_part(block).empty.append(block)
        for number, block in kept:
            if block in self._content:
                self._free_part(block).kept[block] = number

    def forget(self) -> None:
        """Unpublishes all blocks."""
        self._published.clear()
        self._content.clear()
        for part in self._free:
            part.empty += part.kept
            part.kept.clear()

    def free(self, blocks: Sequence[int]) -> None:
        """Returns blocks to the pool. Raises ValueError for a block that is not held."""
        # The last block of a text is reused first, because the first blocks are a prefix for other texts.
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"KV block {block} is freed but was not held")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._content:
                self._free_part(block).kept[block] = next(self._frees)
            else:
                self._free_part(block).empty.append(block)

    def publish(self, block: int, digest: bytes, depth: int = 1) -> None:
        """Publishes a full block under its digest. Nobody may write to it again.

        depth: how many of its layers are valid. If another block has the digest, the one with more valid
        layers is published, or else the one that was first.
        """
        other = self._published.get(digest)
        if other is not None:
            if self._content[other][1] >= depth:
                return
            self._unpublish(other)
        self._published[digest] = block
        self._content[block] = digest, depth

    def reuse(self, digests: Iterable[bytes], depth: int = 1) -> list[int]:
        """Takes hold of the published blocks that match the longest prefix of these digests.

        depth: how many of their layers must be valid.
        """
        found = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None or self._content[block][1] < depth:
                break
            if not self._holders[block]:
                del self._free_part(block).kept[block]
            self._holders[block] += 1
            found.append(block)
        return found

    def _take_one(self, depth: int) -> int:
        part = next(part for part in reversed(self._usable(depth)) if len(part))
        if part.empty:
            block = part.empty.pop()
        else:
            block, _ = part.kept.popitem(last=False)
            del self._published[self._content.pop(block)[0]]
        self._holders[block] = 1
        return block

    def _unpublish(self, block: int) -> None:
        digest, _ = self._content.pop(block)
        del self._published[digest]
        if not self._holders[block]:
            part = self._free_part(block)
            del part.kept[block]
            part.empty.append(block)

    def _usable(self, depth: int) -> list[_FreeBlocks]:
        """The free blocks with at least `depth` layers."""
        return self._free[: bisect_right(self._ends, self.limit(depth))]

    def _free_part(self, block: int) -> _FreeBlocks:
        """The free blocks that have as many layers as this one."""
        return self._free[bisect_right(self._ends, block)]
