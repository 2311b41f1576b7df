"""What queries and keys go through before they meet: norms of heads, and rotary positions."""

from helios.engine.kernels.jit import compiled
from helios.engine.kernels.norm import rms_norm
from helios.engine.kernels.simd import (
    LANES,
    load_long,
    load_some,
    multiply,
    multiply_add,
    store_some,
    subtract,
)


@compiled
def place_queries(attention, batch, qkv, start, end, first, last):
    """Norms and rotates the queries of the heads first..last of rows start..end in place.

    qkv: queries, keys and values of all rows.
    """
    if attention.q_norm == 0 and attention.rotation == 0:
        return
    head_dim = attention.head_dim
    for row in range(start, end):
        position = load_long(batch.positions, row)
        queries = qkv + 4 * row * (attention.heads + 2 * attention.kv_heads) * head_dim
        for head in range(first, last):
            _place(attention, attention.q_norm, position, queries + 4 * head * head_dim)


@compiled
def place_key(attention, position, x):
    """Norms and rotates the key of one head, float32 [head_dim], in place."""
    _place(attention, attention.k_norm, position, x)


@compiled
def _place(attention, norm_weight, position, x):
    head_dim = attention.head_dim
    if norm_weight != 0:
        rms_norm(x, head_dim, attention.epsilon, norm_weight, x)
    if attention.rotation != 0:
        _rotate(x, head_dim // 2, attention.rotation + 4 * position * head_dim)


@compiled
def _rotate(x, half, angles):
    """Rotates each dimension of the first half with that of the second (RoFormer, Su et al. 2021).

    angles: `half` cosines, then as many sines.
    """
    for dim in range(0, half, LANES):
        count = half - dim
        first, second = load_some(x, dim, count), load_some(x, half + dim, count)
        cosines, sines = load_some(angles, dim, count), load_some(angles, half + dim, count)
        store_some(x, dim, count, subtract(multiply(first, cosines), multiply(second, sines)))
        store_some(x, half + dim, count, multiply_add(second, cosines, multiply(first, sines)))
