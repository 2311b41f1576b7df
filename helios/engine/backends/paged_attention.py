"""CPU attention that reads keys and values in place, block by block."""

import numpy as np
import torch

from helios.architectures.spec import ModelConfig
from helios.engine.backends.kv_cache import KVCache
from helios.engine.kernels import border
from helios.engine.kernels.layout import BFLOAT16, FLOAT32, INT8, Attention, BatchAddresses
from helios.engine.kernels.simd import LANES
from helios.engine.kernels.team import TEAM
from helios.engine.scheduling.batch import Batch

# Precision of the products, by the type of keys and values.
_PRECISIONS = {torch.float32: FLOAT32, torch.float16: BFLOAT16, torch.int8: INT8}


def attends_in_place(config: ModelConfig, device: torch.device, block_tokens: int) -> bool:
    """Whether `attend` supports such caches: on a CPU, head_dim in fours, blocks of whole registers."""
    return device.type == "cpu" and config.head_dim % 4 == 0 and block_tokens % LANES == 0


def addresses_of(batch: Batch) -> BatchAddresses:
    """A batch in the form that kernels take."""
    return BatchAddresses.at(batch.address, batch.rows, batch.decode_rows, batch.reads, batch.width)


def attend(qkv: torch.Tensor, batch: Batch, cache: KVCache, layer: int) -> torch.Tensor:
    """Stores the rows' keys and values. Each row attends to its context.

    qkv: queries, keys after their norms and rotations, and values: [T, (heads + 2 * KV heads) * head_dim].
    Returns [T, heads * head_dim].
    """
    heads = qkv.shape[1] // cache.head_dim - 2 * cache.num_heads
    width = heads * cache.head_dim
    keys, values = cache.addresses
    out = qkv.new_empty(batch.rows, width)
    attention = Attention(
        heads=heads,
        kv_heads=cache.num_heads,
        head_dim=cache.head_dim,
        block_tokens=cache.block_tokens,
        keys=keys[layer],
        values=values[layer],
        q_norm=0,
        k_norm=0,
        epsilon=np.float32(0),
        rotation=0,
    )
    TEAM.run(
        border.call_attend,
        _PRECISIONS[cache.dtype],
        tuple(attention),
        tuple(addresses_of(batch)),
        qkv.data_ptr(),
        out.data_ptr(),
        operations=2 * batch.rows * width * batch.width * cache.block_tokens,
    )
    return out
