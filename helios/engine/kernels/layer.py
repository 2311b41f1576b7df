"""The decoder layers, and the KV of layers that a row skips."""

from helios.engine.kernels.attention import attend, remember
from helios.engine.kernels.barrier import meet, share
from helios.engine.kernels.inner_product import TILE
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layout import ALONE, NONE, Attention
from helios.engine.kernels.norm import norm
from helios.engine.kernels.product import (
    COPIES,
    Result,
    can_copy,
    encode,
    encoded_at,
    encoded_bytes,
    multiply_tiles,
    plain,
    product,
    product_scratch,
    tiles_of,
)

# With at least this many rows per thread, each thread owns its rows and works in blocks of this size.
OWN_ROWS = 64


@compiled
def run_layers(thread, model, layers, first, last, hidden, batch, cache, scratch):
    """One thread's part of the decoder layers first..last, in place on hidden, float32 [rows, width].

    model: MODEL; layers: LAYER [all]; batch: `BatchAddresses`; cache: `CacheAddresses`; scratch:
    `layers_scratch` bytes.
    """
    rows, width, ffn_width = batch.rows, model.width, model.ffn_width
    # Whether each thread computes the inputs of products by itself, to wait less often for the others.
    is_copied = can_copy(thread, rows) and model.norm_before
    # The output of attention, and states after a norm. They share memory if they have the same width, unless
    # each thread has its own states.
    query_width = _query_width(model)
    attended = scratch
    x, qkv = attended, attended + 4 * rows * query_width
    if is_copied:
        x, qkv = qkv + 4 * thread.number * width, qkv + 4 * COPIES * width
        # Until here only one thread has worked on the row.
        meet(thread)
    elif query_width != width:
        x, qkv = qkv, qkv + 4 * rows * width
    wide = qkv + 4 * rows * model.qkv_width
    rest = wide + 4 * rows * ffn_width
    # With few rows, all threads share each product by its channels. With many rows, each thread takes blocks
    # of its own rows through all products between two attentions, so that intermediate results stay in its
    # CPU cache.
    start, end = share(thread, rows)
    own = rows >= thread.threads * OWN_ROWS
    own_wide = wide + 4 * start * ffn_width
    own_rest = rest + encoded_bytes(model.precision, start, _widest(model))
    for index in range(first, last):
        layer = layers[index]
        if own:
            for row in range(start, end, OWN_ROWS):
                _project(
                    ALONE,
                    model,
                    layer,
                    hidden + 4 * row * width,
                    min(OWN_ROWS, end - row),
                    x + 4 * row * width,
                    qkv + 4 * row * model.qkv_width,
                    own_rest,
                    False,
                )
            meet(thread)
        else:
            _project(thread, model, layer, hidden, rows, x, qkv, rest, is_copied)
        attend(thread, model.precision, _attention(model, layer, cache, index), batch, qkv, attended)
        if own:
            for row in range(start, end, OWN_ROWS):
                _feed(
                    ALONE,
                    model,
                    layer,
                    hidden + 4 * row * width,
                    min(OWN_ROWS, end - row),
                    attended + 4 * row * query_width,
                    x + 4 * row * width,
                    own_wide,
                    own_rest,
                    False,
                )
        else:
            _feed(thread, model, layer, hidden, rows, attended, x, wide, rest, is_copied)
    if own:
        meet(thread)


@compiled
def layers_scratch(model, rows):
    """Work bytes of `run_layers`.

    They hold attention's output, states, queries with keys and values, fc2's input, and a product's encoded
    input.
    """
    numbers = rows * (_query_width(model) + model.qkv_width + model.ffn_width)
    numbers += max(rows, COPIES) * model.width
    return 4 * numbers + product_scratch(model.precision, rows, _widest(model))


@compiled
def _query_width(model):
    """Width of all query heads of a row."""
    return model.heads * model.head_dim


@compiled
def _widest(model):
    """The most inputs of a product in a layer."""
    return max(model.width, _query_width(model), model.ffn_width)


@compiled
def propagate(thread, model, layers, first, last, hidden, rows, slots, positions, cache, scratch):
    """One thread's part of state propagation: KV of the layers first..last for all rows of hidden.

    hidden: float32 [rows, width]; slots, positions: int64 [rows]; scratch: `propagate_scratch` bytes; the
    rest as in `run_layers`.
    """
    width, qkv_width, precision = model.width, model.qkv_width, model.precision
    x = scratch
    qkv = x + 4 * rows * width
    start, end = share(thread, rows)
    # Queries are not needed, so only the tiles of keys and values are computed.
    skipped = _query_width(model) // TILE
    first_tile, last_tile = share(thread, tiles_of(qkv_width) - skipped)
    for index in range(first, last):
        layer, source = layers[index], hidden
        if model.norm_before:
            norm(model, layer.attn_norm, hidden, start, end, x)
            source = x
        encoded = encoded_at(qkv + 4 * rows * qkv_width, precision, rows, layer.qkv)
        encode(thread, precision, source, layer.qkv, encoded)
        meet(thread)
        result = plain(layer.qkv, qkv)
        multiply_tiles(precision, layer.qkv, encoded, skipped + first_tile, skipped + last_tile, result)
        meet(thread)
        attention = _attention(model, layer, cache, index)
        remember(thread, precision, attention, rows, slots, positions, qkv)
        meet(thread)


@compiled
def propagate_scratch(model, rows):
    """Work bytes of `propagate`: states, queries with keys and values, a product's input."""
    return 4 * rows * (model.width + model.qkv_width) + product_scratch(model.precision, rows, model.width)


@compiled
def _attention(model, layer, cache, index):
    """The attention of a layer."""
    return Attention(
        model.heads,
        model.kv_heads,
        model.head_dim,
        cache.block_tokens,
        cache.keys[index],
        cache.values[index],
        layer.q_norm.weight,
        layer.k_norm.weight,
        model.epsilon,
        model.rotation,
    )


@compiled
def _project(thread, model, layer, hidden, rows, x, qkv, scratch, is_copied):
    """Computes queries, keys and values of the rows of hidden.

    x: space for as many states; is_copied: as in `product`.
    """
    source = hidden
    if model.norm_before:
        # A thread encodes the same rows that it norms, so no barrier is needed in between.
        start, end = _normed_rows(thread, rows, is_copied)
        norm(model, layer.attn_norm, hidden, start, end, x)
        source = x
    product(thread, model.precision, layer.qkv, source, rows, plain(layer.qkv, qkv), scratch, is_copied)


@compiled
def _feed(thread, model, layer, hidden, rows, attended, x, wide, scratch, is_copied):
    """The part of a layer after attention: output projection and feed-forward network.

    attended: the output of attention; x: space for states, perhaps the same; wide: space for float32 [rows,
    ffn_width]; is_copied: as in `product`.
    """
    precision = model.precision
    start, end = _normed_rows(thread, rows, is_copied)
    added = Result(hidden, model.width, NONE, hidden)
    product(thread, precision, layer.out, attended, rows, added, scratch, is_copied)
    source = hidden
    if model.norm_before:
        norm(model, layer.ffn_norm, hidden, start, end, x)
        source = x
    else:
        norm(model, layer.attn_norm, hidden, start, end, hidden)
    activated = Result(wide, model.ffn_width, model.activation, 0)
    product(thread, precision, layer.fc1, source, rows, activated, scratch, is_copied)
    product(thread, precision, layer.fc2, wide, rows, added, scratch, is_copied)
    if not model.norm_before:
        norm(model, layer.ffn_norm, hidden, start, end, hidden)


@compiled
def _normed_rows(thread, rows, is_copied):
    """Start and end of the rows that a thread norms: its share of them, or the single row."""
    if is_copied:
        return 0, 1
    return share(thread, rows)
