"""The step of a model on a CPU, compiled by Numba: products, norms and attention over paged KV.

A product is computed in float32, in bfloat16 or in int8; between products all is float32. In bfloat16 each
row of its input is rounded; in int8 it is quantised over the row's own range (per token), and the weight has
a scale per output channel. Everything works on one row, in an order that no other row changes: a row's
result does not depend on what else is in the batch.

Addresses are integers and nothing is checked here; those who call these own the tensors. Kernels
release the interpreter lock. docs/decisions/0009-compiled-kernels.md says why they are written so.
"""

import numpy as np
from numba import types

from helios.architectures.opt import POSITION_OFFSET
from helios.engine.kernels import attention_float as attention
from helios.engine.kernels import attention_int8 as byte_attention
from helios.engine.kernels.inner_product import (
    BFLOAT16,
    BLOCK_ROWS,
    INT8,
    STEP_BYTES,
    TILE,
    inner_product,
)
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.sampling import SUMMARY, draw
from helios.engine.kernels.simd import (
    LANES,
    add,
    add_shared,
    add_words,
    exponential,
    keep,
    lane_numbers,
    larger,
    largest,
    load_bfloat,
    load_half,
    load_long,
    load_shared,
    load_single,
    load_singles,
    load_some,
    load_words,
    multiply,
    multiply_add,
    multiply_words,
    no_singles,
    round_to_even,
    spread_single,
    spread_word,
    store_bfloats,
    store_bytes,
    store_long,
    store_shared,
    store_single,
    store_singles,
    store_some,
    store_words,
    subtract,
    subtract_words,
    to_singles,
    total,
    where_greater,
)

_yield = types.ExternalFunction("sched_yield", types.int32())
# Looks at a barrier before a thread lets others on its processor go first.
_SPINS = 2000

# Rows of a step, for each thread, from which on every thread has its own; it takes as many at a time.
OWN_ROWS = 64

# What a product does with its sums.
NONE, RELU = 0, 1
# Behind the weights of a product; only int8 has the last two.
_BIASES, _SUMS, _SCALES = 1, 2, 3
# What is looked up is in one of the products' numbers, or in this; int8 is not.
FLOAT16 = 3
# Addresses of a product.
PARTS = 4
# Where `step` finds products among the addresses it is given.
_PROJECT_IN, _PROJECT_OUT, _LM_HEAD = 8, 12, 16
_HEAD_LINEAR = 2


@compiled
def _meet(team, threads):
    """A barrier: each of the team's threads goes on when all have come. team: int64 [2], zero at first."""
    if threads == 1:
        return
    meeting = load_shared(team, 1)
    if add_shared(team, 0, 1) == threads - 1:
        store_shared(team, 0, 0)
        store_shared(team, 1, meeting + 1)
        return
    spins = 0
    while load_shared(team, 1) == meeting:
        spins += 1
        if spins > _SPINS:
            _yield()


@compiled
def _quantize(x, width, words, scale):
    """A row of float32 at x as unsigned bytes; at scale what a step of them is, and the byte that is zero.

    The bytes span what the row has, on both sides of zero: all of them go to what a ReLU let through.
    """
    whole = width - width % LANES
    highest = larger(load_some(x, whole, width - whole), no_singles())
    lowest = larger(subtract(no_singles(), load_some(x, whole, width - whole)), no_singles())
    for column in range(0, whole, LANES):
        value = load_singles(x, column)
        highest, lowest = larger(highest, value), larger(lowest, subtract(no_singles(), value))
    below = largest(lowest)
    # One byte less than there are: both ends may be rounded away from zero.
    span = (largest(highest) + below) / np.float32(254)
    inverse = np.float32(1) / span if span > np.float32(0) else np.float32(0)
    zero = np.rint(below * inverse)
    store_single(scale, 0, span)
    store_single(scale, 1, zero)
    factor, zeros = spread_single(inverse), spread_single(zero)
    for column in range(0, width, LANES):
        value = round_to_even(multiply(load_some(x, column, width - column), factor))
        store_bytes(words, column, add(value, zeros))


@compiled
def _encode(numbers, x, x_stride, start, end, width, words, stride, scales):
    """Rows start..end of float32 at x in the numbers of a product: words [rows, stride]."""
    for row in range(start, end):
        source, target = x + 4 * row * x_stride, words + 4 * row * stride
        if numbers == INT8:
            _quantize(source, width, target, scales + 8 * row)
        elif numbers == BFLOAT16:
            for column in range(0, width, LANES):
                store_bfloats(target, column, load_some(source, column, width - column))
        else:
            for column in range(0, width, LANES):
                store_singles(target, column, load_some(source, column, width - column))


@compiled
def norm(x, start, end, width, weight, bias, out):
    """Layer norm of rows start..end of float32 (epsilon 1e-5, as OPT's); out may be x."""
    whole = width - width % LANES
    for row in range(start, end):
        base = row * width
        sums = no_singles()
        for column in range(0, whole, LANES):
            sums = add(sums, load_singles(x, base + column))
        mean = total(sums)
        for column in range(whole, width):
            mean += load_single(x, base + column)
        mean /= np.float32(width)
        means = spread_single(mean)
        sums = no_singles()
        for column in range(0, whole, LANES):
            difference = subtract(load_singles(x, base + column), means)
            sums = multiply_add(difference, difference, sums)
        variance = total(sums)
        for column in range(whole, width):
            single = load_single(x, base + column) - mean
            variance += single * single
        inverse = np.float32(1) / np.sqrt(variance / np.float32(width) + np.float32(1e-5))
        inverses = spread_single(inverse)
        for column in range(0, whole, LANES):
            value = multiply(subtract(load_singles(x, base + column), means), inverses)
            value = multiply_add(value, load_singles(weight, column), load_singles(bias, column))
            store_singles(out, base + column, value)
        for column in range(whole, width):
            scaled = (load_single(x, base + column) - mean) * inverse
            store_single(out, base + column, scaled * load_single(weight, column) + load_single(bias, column))


@compiled
def _store(
    numbers, sums, place, parts, first, channel, channels, row_scale, zero, activation, residual, out, at
):
    """A register of sums to where they go: scaled, biased, activated, added."""
    if numbers == INT8:
        # Zero is a byte of its own in each row: what that adds is taken off.
        added = multiply_words(load_words(parts[first + _SUMS], channel), spread_word(zero))
        corrected = subtract_words(load_words(sums, place), added)
        scale = multiply(load_singles(parts[first + _SCALES], channel), spread_single(row_scale))
        value = multiply(to_singles(corrected), scale)
    else:
        value = load_singles(sums, place)
    value = add(value, load_singles(parts[first + _BIASES], channel))
    if activation == RELU:
        value = larger(value, no_singles())
    count = channels - channel
    if residual != 0:
        value = add(value, load_some(residual, at, count))
    store_some(out, at, count, value)


@compiled
def _tiles(
    numbers, words, stride, steps, row_scales, rows, parts, first, channels, out, out_stride, activation,
    residual, start, end,
):
    """The tiles start..end of output channels, for all rows of words [rows, stride]. See `product`."""
    room = np.empty(BLOCK_ROWS * TILE, np.int32)
    sums = room.ctypes.data
    tile_bytes = steps * STEP_BYTES
    # Blocks of rows that take turns on a tile each fetch their share of the next one, so that memory is read
    # all the time. One alone reads in order, which the processor fetches ahead by itself.
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    ahead_step = STEP_BYTES // blocks if blocks > 1 else 0
    for tile in range(start, end):
        weights, channel, row = parts[first] + tile * tile_bytes, tile * TILE, 0
        while row < rows:
            count = BLOCK_ROWS
            while count > rows - row:
                count //= 2
            ahead = weights + tile_bytes + row // BLOCK_ROWS * tile_bytes // blocks
            inner_product(
                numbers, count, words + 4 * row * stride, stride, weights, steps, sums, ahead, ahead_step
            )
            for index in range(count):
                scale, zero = np.float32(1), np.int32(0)
                if numbers == INT8:
                    scale = load_single(row_scales, 2 * row)
                    zero = np.int32(load_single(row_scales, 2 * row + 1))
                place, at = index * TILE, row * out_stride + channel
                for half in range(0, TILE, LANES):
                    _store(
                        numbers, sums, place + half, parts, first, channel + half, channels, scale,
                        zero, activation, residual, out, at + half,
                    )
                row += 1
    keep(room)


@compiled
def product(
    thread, threads, team, numbers, x, x_stride, rows, width, parts, first, channels, out, out_stride,
    activation, residual, scratch,
):
    """out = activation(x @ weights.T + biases) + residual: what one thread of a team does of it.

    numbers: what it is computed in (`inner_product`); x: float32 [rows, width], out: float32 [rows,
    channels], with their strides; parts[first] and the three behind it: weights (`linear.pack`), biases
    (float32) and, of int8, sums of weights (int32) and scales (float32), one a channel and padded to whole
    tiles; residual: laid out as out, or 0 for none; scratch: of `product_scratch` bytes.
    """
    steps, stride = _steps(numbers, width), _stride(numbers, width)
    words, row_scales = scratch, scratch + 4 * rows * stride
    start, end = rows * thread // threads, rows * (thread + 1) // threads
    _encode(numbers, x, x_stride, start, end, width, words, stride, row_scales)
    _meet(team, threads)
    tiles = (channels + TILE - 1) // TILE
    start, end = tiles * thread // threads, tiles * (thread + 1) // threads
    _tiles(
        numbers, words, stride, steps, row_scales, rows, parts, first, channels, out, out_stride, activation,
        residual, start, end,
    )
    _meet(team, threads)


@compiled
def attend(
    thread, threads, team, numbers, qkv, rows, heads, head_dim, keys, values, block_tokens, rows_of, out
):
    """Stores the rows' keys and values, then attends from each row to its own context: one thread's part.

    numbers: of the products; qkv: float32 [rows, 3, heads, head_dim], all of it there; keys, values: of a
    layer (`KVCache`); rows_of: `Batch.addresses`; out: float32 [rows, heads, head_dim].
    """
    _remember(
        thread, threads, team, numbers, qkv, rows, heads, head_dim, keys, values, block_tokens, rows_of[2]
    )
    if numbers == INT8:
        byte_attention.attend(
            thread, threads, qkv, rows, heads, head_dim, np.int64(keys), np.int64(values), block_tokens,
            rows_of, out,
        )
    else:
        attention.attend(
            thread, threads, qkv, rows, heads, head_dim, keys, values, block_tokens, rows_of, out
        )
    _meet(team, threads)


@compiled
def _remember(
    thread, threads, team, numbers, qkv, rows, heads, head_dim, keys, values, block_tokens, slots
):
    """Stores keys and values of qkv, float32 [rows, 3, heads, head_dim], at slots: those of a thread's heads,
    of all rows, are there when it returns."""
    if numbers == INT8:
        byte_attention.remember(
            thread, threads, qkv, rows, heads, head_dim, np.int64(keys), np.int64(values), block_tokens, slots
        )
        return
    start, end = rows * thread // threads, rows * (thread + 1) // threads
    attention.remember(qkv, start, end, heads * head_dim, head_dim, keys, values, block_tokens, slots)
    _meet(team, threads)


@compiled
def _project(
    thread, threads, team, numbers, at, norm_before, hidden, rows, width, x, qkv, scratch
):
    """Queries, keys and values of rows of hidden. at: as `layers` takes a layer; x: room for states."""
    source = hidden
    if norm_before:
        # The rows that a thread norms are those that it encodes next: no barrier between.
        start, end = rows * thread // threads, rows * (thread + 1) // threads
        norm(hidden, start, end, width, at[0], at[1], x)
        source = x
    product(
        thread, threads, team, numbers, source, width, rows, width, at, 4, 3 * width, qkv, 3 * width, NONE, 0,
        scratch,
    )


@compiled
def _feed(
    thread, threads, team, numbers, at, norm_before, hidden, rows, width, ffn, x, wide, scratch
):
    """What comes behind attention, whose output is x; then x is room for states, wide for the middle."""
    start, end = rows * thread // threads, rows * (thread + 1) // threads
    product(
        thread, threads, team, numbers, x, width, rows, width, at, 8, width, hidden, width, NONE, hidden,
        scratch,
    )
    source = hidden
    if norm_before:
        norm(hidden, start, end, width, at[2], at[3], x)
        source = x
    else:
        norm(hidden, start, end, width, at[0], at[1], hidden)
    product(
        thread, threads, team, numbers, source, width, rows, width, at, 12, ffn, wide, ffn, RELU, 0, scratch
    )
    product(
        thread, threads, team, numbers, wide, ffn, rows, ffn, at, 16, width, hidden, width, NONE, hidden,
        scratch,
    )
    if not norm_before:
        norm(hidden, start, end, width, at[2], at[3], hidden)


@compiled
def layers(
    thread, threads, team, numbers, parts, first, last, hidden, rows, width, ffn, heads, norm_before, keys,
    values, block_tokens, rows_of, scratch,
):
    """The decoder layers first..last, in place on hidden, float32 [rows, width]: one thread's part.

    numbers: what the products are computed in; parts: int64 [layers, 20], of each the addresses of weight and
    bias of its two norms, then of the products qkv, out, fc1 and fc2 as `product` takes them; keys, values:
    int64 [layers], addresses; scratch: of `layers_scratch` bytes; the rest as in `attend`.
    """
    x = scratch
    qkv = x + 4 * rows * width
    wide = qkv + 4 * rows * 3 * width
    rest = wide + 4 * rows * ffn
    # Few rows: all threads share each product, by its channels. Many: each has rows of its own, and takes
    # them through all products between two attentions a few at a time: what is between stays in its cache.
    start, end = rows * thread // threads, rows * (thread + 1) // threads
    own = rows >= threads * OWN_ROWS
    own_wide = wide + 4 * start * ffn
    own_rest = rest + 4 * start * (max(_stride(numbers, width), _stride(numbers, ffn)) + 2)
    for index in range(first, last):
        at = parts[index]
        if own:
            for row in range(start, end, OWN_ROWS):
                _project(
                    0, 1, 0, numbers, at, norm_before, hidden + 4 * row * width, min(OWN_ROWS, end - row),
                    width, x + 4 * row * width, qkv + 4 * row * 3 * width, own_rest,
                )
            _meet(team, threads)
        else:
            _project(
                thread, threads, team, numbers, at, norm_before, hidden, rows, width, x, qkv, rest
            )
        attend(
            thread, threads, team, numbers, qkv, rows, heads, width // heads, keys[index], values[index],
            block_tokens, rows_of, x,
        )
        if own:
            for row in range(start, end, OWN_ROWS):
                _feed(
                    0, 1, 0, numbers, at, norm_before, hidden + 4 * row * width, min(OWN_ROWS, end - row),
                    width, ffn, x + 4 * row * width, own_wide, own_rest,
                )
        else:
            _feed(
                thread, threads, team, numbers, at, norm_before, hidden, rows, width, ffn, x, wide, rest
            )
    if own:
        _meet(team, threads)


@compiled
def _load_number(numbers, address, index):
    """One as float32."""
    if numbers == FLOAT16:
        return load_half(address, index)
    return load_bfloat(address, index) if numbers == BFLOAT16 else load_single(address, index)


@compiled
def _embed(ends, token_ids, start, end, out):
    """The rows start..end of what `token_ids` stand for, float32 [rows, embed width]. ends: as in `step`."""
    table, numbers, tile, together, tile_numbers, width = ends[0], ends[1], ends[2], ends[3], ends[4], ends[5]
    for row in range(start, end):
        token_id = load_long(token_ids, row)
        source = token_id // tile * tile_numbers + token_id % tile * together
        target = row * width
        for first in range(0, width, together):
            for column in range(min(together, width - first)):
                store_single(out, target + first + column, _load_number(numbers, table, source + column))
            source += tile * together


@compiled
def _add_positions(ends, positions, start, end, width, hidden):
    """Adds to rows start..end of hidden, float32 [rows, width], what stands for their positions."""
    table, numbers = ends[6], ends[7]
    for row in range(start, end):
        source, target = (load_long(positions, row) + POSITION_OFFSET) * width, row * width
        for column in range(width):
            number = load_single(hidden, target + column) + _load_number(numbers, table, source + column)
            store_single(hidden, target + column, number)


@compiled
def _copy_row(source, target, width):
    """One row of float32."""
    for column in range(0, width, LANES):
        count = width - column
        store_some(target, column, count, load_some(source, column, count))


@compiled
def _enter(thread, threads, team, numbers, ends, rows_of, rows, width, hidden, scratch):
    """What stands before the first layer, in hidden, float32 [rows, width]: each thread its rows."""
    start, end = rows * thread // threads, rows * (thread + 1) // threads
    embed_width = ends[5]
    if ends[_PROJECT_IN]:
        _embed(ends, rows_of[0], start, end, scratch)
        product(
            thread, threads, team, numbers, scratch, embed_width, rows, embed_width, ends, _PROJECT_IN, width,
            hidden, width, NONE, 0, scratch + 4 * rows * embed_width,
        )
    else:
        _embed(ends, rows_of[0], start, end, hidden)
    _add_positions(ends, rows_of[1], start, end, width, hidden)


@compiled
def _leave(
    thread, threads, team, numbers, ends, head, x, reads, width, vocabulary, scratch, logits, best, summaries
):
    """Reads out the states x, float32 [reads, width], of which each thread has brought its rows."""
    start, end = reads * thread // threads, reads * (thread + 1) // threads
    embed_width = ends[5]
    if head[0]:
        norm(x, start, end, width, head[0], head[1], x)
    other = scratch
    rest = other + 4 * reads * max(width, embed_width)
    if head[_HEAD_LINEAR]:
        product(
            thread, threads, team, numbers, x, width, reads, width, head, _HEAD_LINEAR, width, other, width,
            NONE, 0, rest,
        )
        x, other = other, x
    if ends[_PROJECT_OUT]:
        product(
            thread, threads, team, numbers, x, width, reads, width, ends, _PROJECT_OUT, embed_width, other,
            embed_width, NONE, 0, rest,
        )
        x = other
    product(
        thread, threads, team, numbers, x, embed_width, reads, embed_width, ends, _LM_HEAD, vocabulary,
        logits, vocabulary, NONE, 0, rest,
    )
    summarize(thread, threads, team, logits, reads, vocabulary, best, summaries)
    _meet(team, threads)


@compiled
def _hand_over(found, vocabulary, row, out, read, exit_layer):
    """A row of what an exit has read out becomes that of a read. found, out: as in `step`."""
    _copy_row(found[0] + 4 * row * vocabulary, out[0] + 4 * read * vocabulary, vocabulary)
    store_long(out[1], read, load_long(found[1], row))
    for number in range(SUMMARY):
        store_single(out[2], SUMMARY * read + number, load_single(found[2], SUMMARY * row + number))
    store_long(out[3], read, exit_layer)


@compiled
def step(
    thread, threads, team, numbers, parts, exits, thresholds, exit_heads, ends, rows, decode_rows, width, ffn,
    heads, norm_before, keys, values, block_tokens, rows_of, reads, vocabulary, scratch, found, out,
):
    """A step, from token ids to what sampling needs: one thread's part.

    exits: int64 [E], the layers at which tokens may leave, ascending; all that are left do at the last one.
    thresholds: float32 [E], how sure a decode row must be to leave before. The KV of layers that it skips is
    computed from its state at the exit. exit_heads: int64 [E, 6], of each exit the addresses of its norm's
    weight (0: none) and bias, and its linear layer, as `product` takes it, with weights at 0 if it has none.
    ends: int64 [20]. Of the table of tokens: its address, its kind (FLOAT32, BFLOAT16, FLOAT16), and how its
    numbers lie, which is as in `linear.pack`: tokens of a tile, numbers together, numbers of a tile, numbers
    of a token. Of the table of positions: address and kind. Then the products of the projections in and out
    and of the LM head, as those of heads.
    rows_of: `Batch.addresses`; out: int64 [4], addresses of logits, float32 [reads, vocabulary], best and
    summaries (see `summarize`), and of each read's exit layer, int64 [reads]; found: the first three again,
    to work in, where there are several exits; scratch: of `step_scratch` bytes; the rest as in `layers`.
    """
    # The rows that are still in the layers, decode rows first: those that leave are closed up.
    positions = scratch
    slots, tables = positions + 8 * rows, positions + 16 * rows
    origins, left_slots = positions + 24 * rows, positions + 32 * rows
    hidden = positions + 40 * rows
    x = hidden + 4 * rows * width
    _enter(thread, threads, team, numbers, ends, rows_of, rows, width, hidden, x)
    running = rows_of.copy()
    last = len(exits) - 1
    if last:
        running[1], running[2], running[3] = positions, slots, tables
        if thread == 0:
            for row in range(rows):
                store_long(positions, row, load_long(rows_of[1], row))
                store_long(slots, row, load_long(rows_of[2], row))
                store_long(tables, row, load_long(rows_of[3], row))
                store_long(origins, row, row)
        _meet(team, threads)
    count, active, first = rows, decode_rows, 0
    for index in range(last + 1):
        layers(
            thread, threads, team, numbers, parts, first, exits[index], hidden, count, width, ffn, heads,
            norm_before, keys, values, block_tokens, running, x,
        )
        if not norm_before:
            # The layers ended with norms, each thread's of its own rows.
            _meet(team, threads)
        first = exits[index]
        if index == last or active == 0:
            continue
        for row in range(active * thread // threads, active * (thread + 1) // threads):
            _copy_row(hidden + 4 * row * width, x + 4 * row * width, width)
        _leave(
            thread, threads, team, numbers, ends, exit_heads[index], x, active, width, vocabulary,
            x + 4 * active * width, found[0], found[1], found[2],
        )
        leaving = 0
        for row in range(active):
            leaving += load_single(found[2], SUMMARY * row + 3) >= thresholds[index]
        if leaving == 0:
            continue
        if thread == 0:
            gone = 0
            for row in range(count):
                if row < active and load_single(found[2], SUMMARY * row + 3) >= thresholds[index]:
                    _hand_over(found, vocabulary, row, out, load_long(origins, row), first)
                    _copy_row(hidden + 4 * row * width, x + 4 * gone * width, width)
                    store_long(left_slots, gone, load_long(slots, row))
                    gone += 1
                elif gone:
                    _copy_row(hidden + 4 * row * width, hidden + 4 * (row - gone) * width, width)
                    store_long(positions, row - gone, load_long(positions, row))
                    store_long(slots, row - gone, load_long(slots, row))
                    store_long(tables, row - gone, load_long(tables, row))
                    store_long(origins, row - gone, load_long(origins, row))
        _meet(team, threads)
        propagate(
            thread, threads, team, numbers, parts, first, exits[last], x, leaving, width, heads, norm_before,
            keys, values, block_tokens, left_slots, x + 4 * leaving * width,
        )
        active, count = active - leaving, count - leaving
        if count == 0:
            return
    # Decode rows are read in their order; prefill rows, behind them, have moved up with those that left.
    gone = decode_rows - active
    remaining = reads - gone
    for read in range(remaining * thread // threads, remaining * (thread + 1) // threads):
        row = read if read < active else load_long(rows_of[4], read + gone) - gone
        _copy_row(hidden + 4 * row * width, x + 4 * read * width, width)
    target = found if gone else out
    _leave(
        thread, threads, team, numbers, ends, exit_heads[last], x, remaining, width, vocabulary,
        x + 4 * remaining * width, target[0], target[1], target[2],
    )
    for read in range(remaining * thread // threads, remaining * (thread + 1) // threads):
        if gone:
            origin = load_long(origins, read) if read < active else read + gone
            _hand_over(found, vocabulary, read, out, origin, first)
        else:
            store_long(out[3], read, first)


@compiled
def burst(
    thread, threads, team, count, seeds, chances, history, history_ends, room, interrupt, last_tokens,
    numbers, parts, exits, thresholds, exit_heads, ends, rows, decode_rows, width, ffn, heads, norm_before,
    keys, values, block_tokens, rows_of, reads, vocabulary, scratch, found, out,
):
    """`count` steps: one, or as many of decodes alone, each of the tokens of the one before.

    seeds, chances, history and history_ends: `burst.Draws`, with no rows where all tokens are the likeliest;
    room: as in `drawing.draw`; interrupt: 0 or the address of `burst.Interrupt`, which may end it after any
    step, as one of a row's `Burst.last_tokens` does; out: as in `step`, with logits of the last step and
    [count, reads] of all else. The sequences' tables have the blocks of all these tokens.
    """
    mine = out.copy()
    for index in range(count):
        step(
            thread, threads, team, numbers, parts, exits, thresholds, exit_heads, ends, rows, decode_rows,
            width, ffn, heads, norm_before, keys, values, block_tokens, rows_of, reads, vocabulary, scratch,
            found, mine,
        )
        if len(seeds):
            # Rows that left early are handed over by one thread.
            _meet(team, threads)
            draw(
                thread, threads, team, mine[0], reads, vocabulary, seeds, chances, history, history_ends,
                index, mine[1], mine[2], room,
            )
        if index + 1 == count:
            return
        _meet(team, threads)
        if thread == 0:
            if interrupt and load_shared(interrupt, 0):
                store_shared(interrupt, 1, index + 1)
            for row in range(rows):
                token = load_long(mine[1], row)
                if interrupt and row < len(last_tokens):
                    for place in range(last_tokens.shape[1]):
                        if token == last_tokens[row, place]:
                            store_shared(interrupt, 1, index + 1)
                position = load_long(rows_of[1], row) + 1
                table = rows_of[5] + 8 * load_long(rows_of[3], row) * rows_of[6]
                slot = load_long(table, position // block_tokens) * block_tokens + position % block_tokens
                store_long(rows_of[0], row, token)
                store_long(rows_of[1], row, position)
                store_long(rows_of[2], row, slot)
        _meet(team, threads)
        if interrupt and load_shared(interrupt, 1):
            return
        mine[1] += 8 * reads
        mine[2] += 4 * SUMMARY * reads
        mine[3] += 8 * reads


@compiled
def propagate(
    thread, threads, team, numbers, parts, first, last, hidden, rows, width, heads, norm_before, keys,
    values, block_tokens, slots, scratch,
):
    """Keys and values of the layers first..last, all of hidden, float32 [rows, width]: one thread's part.

    slots: int64 [rows]; scratch: of `propagate_scratch` bytes; the rest as in `layers`.
    """
    x = scratch
    qkv = x + 4 * rows * width
    words = qkv + 4 * rows * 3 * width
    steps, stride = _steps(numbers, width), _stride(numbers, width)
    row_scales = words + 4 * rows * stride
    start, end = rows * thread // threads, rows * (thread + 1) // threads
    # Queries are not asked for: only the tiles that hold keys and values.
    skipped = width // TILE
    tiles = (3 * width + TILE - 1) // TILE - skipped
    first_tile, last_tile = skipped + tiles * thread // threads, skipped + tiles * (thread + 1) // threads
    for index in range(first, last):
        at = parts[index]
        source = hidden
        if norm_before:
            norm(hidden, start, end, width, at[0], at[1], x)
            source = x
        _encode(numbers, source, width, start, end, width, words, stride, row_scales)
        _meet(team, threads)
        _tiles(
            numbers, words, stride, steps, row_scales, rows, at, 4, 3 * width, qkv, 3 * width, NONE, 0,
            first_tile, last_tile,
        )
        _meet(team, threads)
        _remember(
            thread, threads, team, numbers, qkv, rows, heads, width // heads, keys[index], values[index],
            block_tokens, slots,
        )
        _meet(team, threads)


@compiled
def summarize(thread, threads, _team, logits, rows, width, best, summaries):
    """What sampling needs of each row of logits, float32 [rows, width].

    best: int64 [rows], the first of the largest; summaries: float32 [rows, 4], the largest, log-sum-exp, and
    the largest's log-probability and probability.
    """
    whole = width - width % LANES
    room, places = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        base = row * width
        peak, place = np.float32(-np.inf), np.int64(0)
        if whole:
            peaks, columns = load_singles(logits, base), lane_numbers()
            found, step = columns, spread_word(np.int32(LANES))
            for column in range(LANES, whole, LANES):
                columns = add_words(columns, step)
                value = load_singles(logits, base + column)
                found = where_greater(value, peaks, columns, found)
                peaks = larger(peaks, value)
            store_singles(room.ctypes.data, 0, peaks)
            store_words(places.ctypes.data, 0, found)
            for lane in range(LANES):
                if room[lane] > peak or (room[lane] == peak and places[lane] < place):
                    peak, place = room[lane], np.int64(places[lane])
        for column in range(whole, width):
            single = load_single(logits, base + column)
            if single > peak:
                peak, place = single, np.int64(column)
        highest, sums = spread_single(peak), no_singles()
        for column in range(0, whole, LANES):
            sums = add(sums, exponential(subtract(load_singles(logits, base + column), highest)))
        mass = total(sums)
        for column in range(whole, width):
            mass += np.exp(load_single(logits, base + column) - peak)
        normalizer = peak + np.log(mass)
        store_long(best, row, place)
        store_single(summaries, SUMMARY * row, peak)
        store_single(summaries, SUMMARY * row + 1, normalizer)
        store_single(summaries, SUMMARY * row + 2, peak - normalizer)
        store_single(summaries, SUMMARY * row + 3, np.exp(peak - normalizer))
    keep(room)
    keep(places)


@compiled
def _steps(numbers, width):
    """Words of a row."""
    if numbers == INT8:
        return (width + 3) // 4
    return (width + 1) // 2 if numbers == BFLOAT16 else width


@compiled
def _stride(numbers, width):
    """Words from a row to the next: whole registers, and one more lest rows fall on the same cache lines."""
    return (_steps(numbers, width) + LANES - 1) // LANES * LANES + LANES


def product_scratch(numbers: int, rows: int, width: int) -> int:
    """Bytes that `product` works on: its input's words, and a scale and a zero for each row."""
    return 4 * rows * (int(_stride(numbers, width)) + 2)


def layers_scratch(numbers: int, rows: int, width: int, ffn: int) -> int:
    """Bytes that `layers` works on: states, projections, the feed-forward's middle, the widest product's."""
    return 4 * rows * (4 * width + ffn) + product_scratch(numbers, rows, max(width, ffn))


def step_scratch(numbers: int, rows: int, width: int, ffn: int, embed_width: int) -> int:
    """Bytes that `step` works on: what follows rows, states, then the layers' or the reading's or, beside
    states of their own, those of rows that leave early."""
    wide = max(width, embed_width)
    reading = 4 * rows * (width + wide) + product_scratch(numbers, rows, wide)
    leaving = 4 * rows * width + propagate_scratch(numbers, rows, width)
    return rows * (40 + 4 * width) + max(layers_scratch(numbers, rows, width, ffn), reading, leaving)


def propagate_scratch(numbers: int, rows: int, width: int) -> int:
    """Bytes that `propagate` works on: states, projections, the product's."""
    return 4 * rows * 4 * width + product_scratch(numbers, rows, width)
