"""The paged KV cache: keys and values in blocks. `block_pool.py` tracks who holds each block."""

import logging
import math
import mmap
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from helios.architectures.spec import ModelConfig
from helios.engine.kernels.attention_int8 import first_half, key_bytes, value_bytes
from helios.engine.kernels.product import LEAST
from helios.engine.kernels.simd import LANES
from helios.engine.weights.precision import checkpoint_dtype
from helios.modes import Precision

log = logging.getLogger(__name__)

# Compiled code reads a head's values in whole registers, so bytes beyond their end must be readable.
_SPARE_BYTES = 2 * LANES * 4
# Memory is returned to the system in parts of this many bytes, so that other threads can run in between.
_RELEASED_BYTES = 4 << 20
# mmap(2) flag: reserve address space without memory. Python's mmap has no name for it before 3.13.
_MAP_NORESERVE = 0x4000
_KEPT_BESIDE = {Precision.FLOAT32: torch.float32, Precision.INT8: torch.int8}


def kv_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of keys and values when products are computed in `precision`.

    On a CPU: int8 with int8 products, and float16 with bfloat16 products (bfloat16 would be coarser). Memory
    bandwidth limits attention, and these types need a quarter or half of the bytes.
    """
    if device.type != "cpu":
        return checkpoint_dtype(precision)
    return _KEPT_BESIDE.get(precision, torch.float16)


def kv_bytes(num_heads: int, head_dim: int, block_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one block's keys and values in one layer."""
    return dtype.itemsize * num_heads * sum(map(math.prod, _slabs(head_dim, block_tokens, dtype)))


def _slabs(head_dim: int, block_tokens: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a head's keys and of its values in a block."""
    if dtype == torch.int8:
        keys, values = key_bytes(head_dim, block_tokens), value_bytes(head_dim, block_tokens)
        return (keys,), (values,)
    return (head_dim, block_tokens), (block_tokens, head_dim)


class KVCache:
    """Keys and values of every slot. slot = block * block_tokens + offset in the block.

    Keys of a block are stored as [blocks, heads, head_dim, block_tokens], so that a register holds one
    dimension of as many keys as it has lanes. Values are [blocks, heads, block_tokens, head_dim], which is
    the order of their weighted sum.

    In int8 the four numbers that one instruction multiplies lie together. For keys these are four dimensions:
    [blocks, heads, head_dim / 4, block_tokens, 4], stored with 128 added. For values these are four tokens:
    [blocks, heads, block_tokens / 4, head_dim, 4], with the dimensions padded to whole registers. After a
    head's keys come the scales of both halves of its keys (`first_half`) and of its values, float32 [3,
    block_tokens].

    `resize` can change the numbers of layers and blocks while sequences hold blocks, and layers may have
    different numbers of blocks. On a CPU each layer has address space for the largest number of blocks, so
    nothing moves. The system provides memory page by page at first use, and `give_back` returns it.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        most_blocks: int = 0,
        commit: bool = True,
    ) -> None:
        """most_blocks: the most that `resize` may ask for, if that is more than num_blocks.

        commit: the system provides the memory of all blocks now, before serving.
        Raises RuntimeError, MemoryError or OSError when there is no memory.
        """
        self.block_tokens, self.dtype, self.device = block_tokens, dtype, device
        self.num_heads, self.head_dim = num_heads, head_dim
        keys, values = _slabs(head_dim, block_tokens, dtype)
        self._shapes = (num_heads, *keys), (num_heads, *values)
        self._most_blocks = max(num_blocks, most_blocks)
        self._rooms: list[tuple[_Room, _Room]] = []
        # One tensor per layer.
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        # Addresses of each layer's keys and values. A new object whenever anything has moved (`resize`).
        self.addresses: tuple[NDArray[Any], NDArray[Any]] = self._locate()
        self.resize([num_blocks] * num_layers)
        if commit:
            self.commit()

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        depth: int,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        most_blocks: int = 0,
        commit: bool = True,
    ) -> Self:
        """A cache for the first `depth` layers of a model."""
        heads, head_dim = config.num_kv_heads, config.head_dim
        return cls(
            depth,
            num_blocks,
            block_tokens,
            heads,
            head_dim,
            dtype,
            device,
            most_blocks=most_blocks,
            commit=commit,
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks that every layer has."""
        return min(map(len, (*self.keys, *self.values)), default=0)

    @property
    def is_in_place(self) -> bool:
        """Whether `resize` moves nothing, and can shrink as well as grow."""
        return self.device.type == "cpu"

    def has_room_for(self, num_blocks: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether `resize` can turn this cache into one with such blocks."""
        same = (self.num_heads, self.head_dim, self.dtype) == (num_heads, head_dim, dtype)
        return same and num_blocks <= self._most_blocks

    def commit(self) -> None:
        """Makes the system provide the memory of all blocks now. Erases them on a CPU."""
        if self.device.type == "cpu":
            for tensor in (*self.keys, *self.values):
                tensor.zero_()

    def resize(self, layer_blocks: Sequence[int]) -> None:
        """Keeps or adds one layer for each of these numbers of blocks.

        Layers and blocks that stay keep their content. On a GPU without memory for more blocks, layers keep
        the blocks that they have; then `self.num_blocks` is smaller. Raises RuntimeError, MemoryError or
        OSError if there is no memory for another layer; then the cache has fewer layers.
        """
        del self.keys[len(layer_blocks) :], self.values[len(layer_blocks) :]
        try:
            for layer, num_blocks in enumerate(layer_blocks):
                self._resize_layer(layer, num_blocks)
        finally:
            found = self._locate()
            if not all(map(np.array_equal, found, self.addresses)):
                self.addresses = found

    def give_back(self) -> None:
        """Returns memory of dropped layers and blocks to the system. Others may use the cache meanwhile."""
        for layer, rooms in enumerate(self._rooms):
            for room, tensors in zip(rooms, (self.keys, self.values), strict=True):
                room.give_back(tensors[layer].nbytes if layer < len(tensors) else 0)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [tokens, heads, head_dim] at slots [tokens]."""
        blocks, offsets = slots // self.block_tokens, slots % self.block_tokens
        if self.dtype == torch.int8:
            self._write_bytes(layer, blocks, offsets, keys.float(), values.float())
            return
        self.keys[layer][blocks, :, :, offsets] = keys.to(self.dtype)
        self.values[layer][blocks, :, offsets] = values.to(self.dtype)

    def copy(self, source: int, target: int) -> None:
        """Copies a block in all layers that have both blocks."""
        for tensor in (*self.keys, *self.values):
            if max(source, target) < len(tensor):
                tensor[target] = tensor[source]

    def fill(self, blocks: Sequence[int], other: "KVCache", first: int) -> None:
        """Fills blocks with those of another cache from its block `first` on, in all layers of the other.

        Its blocks have the same shape and type.
        """
        for kind, parts in ((self.keys, other.keys), (self.values, other.values)):
            for tensor, part in zip(kind, parts, strict=False):
                for source, block in enumerate(blocks, first):
                    tensor[block] = part[source]

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of blocks [rows, blocks], each [rows, heads, blocks * block_tokens, head_dim]."""
        if self.dtype == torch.int8:
            return self._gather_bytes(layer, blocks)
        # [rows, heads, blocks, tokens, head_dim]
        keys = self.keys[layer][blocks].permute(0, 2, 1, 4, 3)
        values = self.values[layer][blocks].transpose(1, 2)
        return keys.flatten(2, 3), values.flatten(2, 3)

    def _write_bytes(
        self,
        layer: int,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        key_numbers, value_numbers, scales = self._bytes_of(layer)
        halves = []
        for index, half in enumerate(keys.split(self._halves, dim=2)):
            rounded, scales[blocks, :, index, offsets] = _rounded(half)
            halves.append(rounded)
        values, scales[blocks, :, 2, offsets] = _rounded(values)
        words = F.pad(torch.cat(halves, dim=2) + 128, (0, -self.head_dim % 4)).unflatten(2, (-1, 4))
        key_numbers[blocks, :, :, offsets] = words.to(torch.uint8)
        value_numbers[blocks, :, offsets // 4, : self.head_dim, offsets % 4] = values.to(torch.int8)

    def _gather_bytes(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_numbers, value_numbers, scales = self._bytes_of(layer)
        # [rows, heads, blocks, tokens, head_dim]
        keys = key_numbers[blocks].permute(0, 2, 1, 4, 3, 5).flatten(4).float() - 128
        values = value_numbers[blocks].permute(0, 2, 1, 3, 5, 4).flatten(3, 4).float()
        # Three tensors [rows, heads, blocks, tokens, 1].
        *of_keys, of_values = scales[blocks].transpose(1, 2)[..., None].unbind(3)
        halves = keys[..., : self.head_dim].split(self._halves, dim=4)
        keys = torch.cat([half * factor for half, factor in zip(halves, of_keys, strict=False)], dim=4)
        values = values[:, :, :, : self.block_tokens, : self.head_dim] * of_values
        return keys.flatten(2, 3), values.flatten(2, 3)

    def _bytes_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A layer's keys and values in groups of four, and their scales, as the class describes."""
        keys, tokens = self.keys[layer], self.block_tokens
        scales = keys[..., -12 * tokens :].view(torch.float32).unflatten(2, (3, tokens))
        numbers = keys[..., : -12 * tokens].view(torch.uint8).unflatten(2, (-1, tokens, 4))
        return numbers, self.values[layer].unflatten(2, (-(-tokens // 4), -1, 4)), scales

    @property
    def _halves(self) -> list[int]:
        """Dimensions of a key's halves."""
        first = first_half(self.head_dim)
        return [size for size in (first, self.head_dim - first) if size]

    def _resize_layer(self, layer: int, num_blocks: int) -> None:
        if self.device.type != "cpu":
            self._resize_on_device(layer, num_blocks)
            return
        if layer == len(self._rooms):
            keys, values = (_Room(self._most_blocks * math.prod(shape), self.dtype) for shape in self._shapes)
            self._rooms.append((keys, values))
        for tensors, room, shape in zip(
            (self.keys, self.values), self._rooms[layer], self._shapes, strict=True
        ):
            tensors[layer : layer + 1] = [room.tensor((num_blocks, *shape))]

    def _resize_on_device(self, layer: int, num_blocks: int) -> None:
        for tensors, shape in zip((self.keys, self.values), self._shapes, strict=True):
            if layer == len(tensors):
                tensors.append(torch.zeros(num_blocks, *shape, dtype=self.dtype, device=self.device))
            elif num_blocks > len(old := tensors[layer]):
                try:
                    grown = old.new_zeros(num_blocks, *shape)
                except RuntimeError as error:
                    log.warning("KV blocks stay as few as they were, there is no memory for more: %s", error)
                    return
                grown[: len(old)] = old
                tensors[layer] = grown

    def _locate(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Addresses of each layer's keys and values for compiled code; unsigned integers for float16."""
        kind = np.uint64 if self.dtype == torch.float16 else np.int64
        keys, values = (
            np.array([tensor.data_ptr() for tensor in tensors], dtype=kind)
            for tensors in (self.keys, self.values)
        )
        return keys, values


def _rounded(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers [tokens, heads, dimensions] and scales [tokens, heads]. `attention_int8` rounds alike."""
    peaks = numbers.abs().amax(dim=2)
    inverses = torch.where(peaks > LEAST, 127 / peaks, 0)
    return (numbers * inverses[..., None]).round(), peaks / 127


class _Room:
    """Address space for a layer's keys or values, zero at first."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        size = count * dtype.itemsize + _SPARE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, size, flags=flags)
        self._numbers = torch.frombuffer(self._map, dtype=dtype)
        # Only this many bytes from the start can have memory.
        self._used = 0

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of this shape at the start of this address space."""
        found = self._numbers[: math.prod(shape)].view(shape)
        self._used = max(self._used, found.nbytes)
        return found

    def give_back(self, kept: int) -> None:
        """Returns all memory after the first `kept` bytes to the system."""
        start = -(-kept // mmap.PAGESIZE) * mmap.PAGESIZE
        for at in range(start, self._used, _RELEASED_BYTES):
            self._map.madvise(mmap.MADV_DONTNEED, at, min(_RELEASED_BYTES, self._used - at))
        self._used = min(self._used, kept)
