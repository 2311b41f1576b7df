"""Attention of a layer over paged KV, in the precision that the keys and values are kept in."""

import numpy as np

from helios.engine.kernels.attention_float import attend_float, remember_float
from helios.engine.kernels.attention_int8 import attend_int8, remember_int8
from helios.engine.kernels.barrier import meet
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layout import INT8, Attention


@compiled
def attend(thread, precision, attention, batch, qkv, out):
    """Stores the rows' keys and values, then attends from each row to its own context: one thread's part.

    precision: of the products; attention: `layout.Attention`; qkv: queries, keys and values of all rows,
    float32 [rows, heads + 2 * kv_heads, head_dim]; out: float32 [rows, heads, head_dim].
    """
    remember(thread, precision, attention, batch.rows, batch.slots, qkv)
    if precision == INT8:
        attend_int8(thread, _signed(attention), batch, qkv, out)
    else:
        attend_float(thread, attention, batch, qkv, out)
    meet(thread)


@compiled
def remember(thread, precision, attention, rows, slots, qkv):
    """Stores the keys and values of qkv at slots, int64 [rows].

    When it returns, those of the heads that this thread attends with are stored, of all rows.
    """
    if precision == INT8:
        remember_int8(thread, _signed(attention), rows, slots, qkv)
        return
    remember_float(thread, attention, rows, slots, qkv)
    meet(thread)


@compiled
def _signed(attention):
    """With signed addresses, so that int8's code is compiled once. Unsigned ones are those of float16."""
    return Attention(
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        attention.block_tokens,
        np.int64(attention.keys),
        np.int64(attention.values),
    )
