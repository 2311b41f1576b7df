"""Paged KV: the tensors that hold keys and values, block by block (`block_pool.py` says whose they are)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from helios.engine.precision import Precision

# Of a cache on a CPU (`kv_dtype`).
_NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16}


def kv_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Of keys and values beside products in `precision`.

    On a CPU float16 beside bfloat16 and int8, which are coarser: attention waits for memory, and reads half
    as many bytes then.
    """
    if device.type != "cpu":
        return precision.dtype
    return torch.float32 if precision is Precision.FLOAT32 else torch.float16


class KVCache:
    """Keys and values of every slot; slot = block * block_tokens + offset in the block.

    A block's tokens lie side by side in each dimension of each head: [blocks, heads, head_dim, block_tokens],
    so that attention takes as many tokens at once as a register has lanes.
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
        commit: bool = True,
    ) -> None:
        """commit: the system gives its memory now, ahead of serving; else page by page, at its first use."""
        self.block_tokens = block_tokens
        shape = (num_blocks, num_heads, head_dim, block_tokens)
        self.keys = [_zeros(shape, dtype, device, commit=commit) for _ in range(num_layers)]
        self.values = [_zeros(shape, dtype, device, commit=commit) for _ in range(num_layers)]
        self.addresses = self._locate()

    @property
    def num_blocks(self) -> int:
        """Blocks that all layers have."""
        return min(map(len, (*self.keys, *self.values)))

    def _locate(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Where each layer's keys and values lie, for compiled code: unsigned where they are float16."""
        kind = np.uint64 if self.keys[0].dtype == torch.float16 else np.int64
        keys, values = (
            np.array([tensor.data_ptr() for tensor in tensors], dtype=kind)
            for tensors in (self.keys, self.values)
        )
        return keys, values

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [tokens, heads, head_dim] at slots [tokens]."""
        blocks, offsets = slots // self.block_tokens, slots % self.block_tokens
        for tensor, new in ((self.keys[layer], keys), (self.values[layer], values)):
            tensor[blocks, :, :, offsets] = new.to(tensor.dtype)

    def copy(self, source: int, target: int) -> None:
        """Copies a block, in all layers."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of blocks [rows, blocks], each [rows, heads, blocks * block_tokens, head_dim]."""
        rows, width = blocks.shape

        def of(tensor: torch.Tensor) -> torch.Tensor:
            whole = tensor.index_select(0, blocks.flatten()).view(rows, width, *tensor.shape[1:])
            # [rows, blocks, heads, head_dim, tokens] -> [rows, heads, blocks, tokens, head_dim]
            return whole.permute(0, 2, 1, 4, 3).flatten(2, 3)

        return of(self.keys[layer]), of(self.values[layer])

    def drop(self, num_layers: int) -> None:
        """Drops the layers from `num_layers` on."""
        del self.keys[num_layers:], self.values[num_layers:]
        self.addresses = self._locate()

    def grow(self, num_blocks: int) -> Iterator[None]:
        """Gives each layer `num_blocks` blocks where it has fewer, one tensor of keys or values at a time.

        No more than that one is held twice, and whoever iterates can serve in between. Raises RuntimeError or
        MemoryError when there is no memory for more; what there was stays.
        """
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if num_blocks > len(old):
                    shape = (num_blocks, *old.shape[1:])
                    grown = _zeros(shape, old.dtype, old.device, commit=False)
                    grown[: len(old)] = old
                    tensors[layer] = grown
                    self.addresses = self._locate()
                    yield


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, commit: bool) -> torch.Tensor:
    if commit or device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks for zeroed memory, which the system gives without touching it; torch would write the zeros.
    return torch.from_numpy(np.zeros(shape, dtype=_NUMPY_DTYPES[dtype]))
