"""Attention that reads keys and values in place, block by block, on a CPU."""

import torch

from helios.engine import kernels
from helios.engine.batch import Batch
from helios.engine.kv_cache import KVCache
from helios.engine.simd import LANES
from helios.engine.team import TEAM


def reads_in_place(cache: KVCache) -> bool:
    """Whether `attend` can work on this cache: on a CPU, dimensions in fours, whole registers."""
    keys = cache.keys[0]
    return (
        keys.device.type == "cpu"
        and keys.dtype in (torch.float32, torch.float16)
        and keys.shape[2] % 4 == 0
        and cache.block_tokens % LANES == 0
    )


def attend(qkv: torch.Tensor, batch: Batch, cache: KVCache, layer: int) -> torch.Tensor:
    """Stores the rows' keys and values; each row attends to its context: [T, 3 * hidden] -> [T, hidden]."""
    rows, width = len(qkv), qkv.shape[1] // 3
    _, heads, head_dim, block_tokens = cache.keys[layer].shape
    keys, values = cache.addresses
    out = qkv.new_empty(rows, width)
    TEAM.run(
        kernels.attend,
        qkv.data_ptr(),
        rows,
        heads,
        head_dim,
        keys[layer],
        values[layer],
        block_tokens,
        batch.addresses,
        out.data_ptr(),
        operations=2 * rows * width * batch.width * block_tokens,
    )
    return out
