"""Attention that reads keys and values in place, block by block, on a CPU."""

import torch

from helios.engine.backends.kv_cache import KVCache
from helios.engine.kernels import step as kernels
from helios.engine.kernels.inner_product import BFLOAT16, FLOAT32, INT8
from helios.engine.kernels.simd import LANES
from helios.engine.kernels.team import TEAM
from helios.engine.scheduling.batch import Batch

# In which numbers keys and values are kept beside those that products are computed in.
_NUMBERS = {torch.float32: FLOAT32, torch.float16: BFLOAT16, torch.int8: INT8}


def attends_in_place(device: torch.device, head_dim: int, block_tokens: int) -> bool:
    """Whether `attend` can work on such caches: on a CPU, dimensions in fours, blocks of whole registers."""
    return device.type == "cpu" and head_dim % 4 == 0 and block_tokens % LANES == 0


def attend(qkv: torch.Tensor, batch: Batch, cache: KVCache, layer: int) -> torch.Tensor:
    """Stores the rows' keys and values; each row attends to its context: [T, 3 * hidden] -> [T, hidden]."""
    rows, width = len(qkv), qkv.shape[1] // 3
    keys, values = cache.addresses
    out = qkv.new_empty(rows, width)
    TEAM.run(
        kernels.attend,
        _NUMBERS[cache.dtype],
        qkv.data_ptr(),
        rows,
        cache.num_heads,
        cache.head_dim,
        keys[layer],
        values[layer],
        cache.block_tokens,
        batch.addresses,
        out.data_ptr(),
        operations=2 * rows * width * batch.width * cache.block_tokens,
    )
    return out
