"""Paged KV: the tensors that hold keys and values, block by block (`block_pool.py` says whose they are)."""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from helios.engine.precision import Precision

log = logging.getLogger(__name__)


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
    ) -> None:
        self.block_tokens = block_tokens
        shape = (num_blocks, num_heads, head_dim, block_tokens)
        # Zeros, not empty: the pages are committed here, ahead of serving.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
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

    def shrink(self, num_layers: int, num_blocks: int) -> int:
        """Drops the layers above `num_layers` and gives the others `num_blocks` blocks, no fewer than before.

        Layer by layer, so that no more than one layer is held twice. Returns the blocks that all layers have
        now: those of before when there is no memory for more.
        """
        del self.keys[num_layers:], self.values[num_layers:]
        try:
            for tensors in (self.keys, self.values):
                for layer, old in enumerate(tensors):
                    if num_blocks > len(old):
                        grown = torch.zeros((num_blocks, *old.shape[1:]), dtype=old.dtype, device=old.device)
                        grown[: len(old)] = old
                        tensors[layer] = grown
        except RuntimeError as error:  # torch's allocator
            log.warning("the KV pool stays as large as it was, there is no memory for more: %s", error)
        self.addresses = self._locate()
        return self.num_blocks
