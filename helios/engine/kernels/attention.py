"""Attention of one layer over paged KV, in the precision of the keys and values."""

import numpy as np

from helios.engine.kernels.attention_float import attend_float, remember_float
from helios.engine.kernels.attention_int8 import attend_int8, remember_int8
from helios.engine.kernels.barrier import meet
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layout import INT8, Attention


@compiled
def attend(thread, precision, attention, batch, qkv, out):
    """One thread's part: stores the rows' keys and values, then each row attends to its own context.

    precision: of the products; attention: `layout.Attention`; qkv: queries, keys and values of all rows,
    float32 [rows, heads + 2 * kv_heads, head_dim], are placed in it; out: float32 [rows, heads, head_dim].
    """
    remember(thread, precision, attention, batch.rows, batch.slots, batch.positions, qkv)
    if precision == INT8:
        attend_int8(thread, _signed(attention), batch, qkv, out)
    else:
        attend_float(thread, attention, batch, qkv, out)
    meet(thread)


@compiled
def remember(thread, precision, attention, rows, slots, positions, qkv):
    """Stores the keys and values of qkv at slots. slots, positions: int64 [rows].

    Keys are placed in qkv first. When it returns, all rows of the heads with which this thread attends are
    stored.
    """
    if precision == INT8:
        remember_int8(thread, _signed(attention), rows, slots, positions, qkv)
        if attention.heads == attention.kv_heads:
            # Each thread attends with the heads that it has stored.
            return
    else:
        remember_float(thread, attention, rows, slots, positions, qkv)
    meet(thread)


@compiled
def _signed(attention):
    """Makes the addresses signed, so that the int8 code is compiled only once. Unsigned ones mean float16."""
    return Attention(
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        attention.block_tokens,
        np.int64(attention.keys),
        np.int64(attention.values),
        attention.q_norm,
        attention.k_norm,
        attention.epsilon,
        attention.rotation,
    )
