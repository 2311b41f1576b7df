"""The step of a model on a CPU, compiled by Numba: int8 products, norms and attention over paged KV.

A product quantises each row of its input by the row's own largest value (per token) and has one scale per
output channel of its weight. Sums of products of bytes are exact integers, and everything else works on one
row: a row's result does not depend on what else is in the batch.

Addresses are integers and nothing is checked here; those who call these own the tensors. Kernels
release the interpreter lock. docs/decisions/0009-compiled-kernels.md says why they are written so.
"""

import math

import numpy as np
from numba import njit, types

from helios.engine.simd import (
    LANES,
    absolute,
    add,
    add_shared,
    add_words,
    byte_dot_product,
    floor,
    lane_numbers,
    larger,
    largest,
    load_bytes,
    load_long,
    load_shared,
    load_single,
    load_singles,
    load_words,
    multiply,
    multiply_add,
    no_singles,
    no_words,
    power_of_two,
    round_to_even,
    spread_bytes,
    spread_single,
    spread_word,
    store_byte,
    store_bytes,
    store_long,
    store_shared,
    store_single,
    store_singles,
    store_words,
    subtract,
    subtract_words,
    to_singles,
    total,
    where_greater,
)

# Output channels of a tile of weights, and rows of a tile of input: so many sums stay in registers.
TILE = 2 * LANES
_ROWS = 4
_LOG2_E = math.log2(math.e)
# 2**x on [0, 1): the Taylor series in x ln 2, as exact as float32 is.
_EXP = tuple(math.log(2) ** power / math.factorial(power) for power in range(8))

_compiled = njit(nogil=True, error_model="numpy", cache=True)

_yield = types.ExternalFunction("sched_yield", types.int32())
# Looks at a barrier before a thread lets others on its processor go first.
_SPINS = 2000

# What a product does with its sums.
NONE, RELU = 0, 1
# Behind the weights of a product.
_CORRECTIONS, _SCALES, _BIASES = 1, 2, 3


@_compiled
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


@_compiled
def quantize(x, stride, start, end, width, quantized, padded, scales):
    """Rows start..end of float32 at x as unsigned bytes around 128, [rows, padded], and each row's scale."""
    whole = width - width % LANES
    for row in range(start, end):
        base, out = row * stride, row * padded
        peaks = no_singles()
        for column in range(0, whole, LANES):
            peaks = larger(peaks, absolute(load_singles(x, base + column)))
        peak = largest(peaks)
        for column in range(whole, width):
            peak = max(peak, abs(load_single(x, base + column)))
        store_single(scales, row, peak / np.float32(127))
        inverse = np.float32(127) / peak if peak > np.float32(0) else np.float32(0)
        factor, middle = spread_single(inverse), spread_single(np.float32(128))
        for column in range(0, whole, LANES):
            value = round_to_even(multiply(load_singles(x, base + column), factor))
            store_bytes(quantized, out + column, add(value, middle))
        for column in range(whole, width):
            value = np.rint(load_single(x, base + column) * inverse) + np.float32(128)
            store_byte(quantized, out + column, np.uint8(value))


@_compiled
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


@_compiled
def _finish(sums, parts, first, channel, row_scale, activation, residual, at):
    """A sum of products as float32: corrected for the 128 in the input, scaled, biased, activated, added."""
    value = to_singles(subtract_words(sums, load_words(parts[first + _CORRECTIONS], channel)))
    scale = multiply(load_singles(parts[first + _SCALES], channel), spread_single(row_scale))
    value = add(multiply(value, scale), load_singles(parts[first + _BIASES], channel))
    if activation == RELU:
        value = larger(value, no_singles())
    if residual != 0:
        value = add(value, load_singles(residual, at))
    return value


@_compiled
def _keep(out, at, count, value):
    """Stores the first `count` lanes."""
    if count >= LANES:
        store_singles(out, at, value)
        return
    lanes = np.empty(LANES, np.float32)
    store_singles(lanes.ctypes.data, 0, value)
    for lane in range(count):
        store_single(out, at + lane, lanes[lane])


@_compiled
def _store(low, high, parts, first, channel, channels, row_scale, activation, residual, out, at):
    """The sums of one row and tile to where they go."""
    value = _finish(low, parts, first, channel, row_scale, activation, residual, at)
    _keep(out, at, channels - channel, value)
    value = _finish(high, parts, first, channel + LANES, row_scale, activation, residual, at + LANES)
    _keep(out, at + LANES, channels - channel - LANES, value)


@_compiled
def _tiles(
    x, row_scales, rows, padded, parts, first, channels, out, stride, activation, residual, start, end
):
    """The tiles start..end of output channels, for all rows of bytes x [rows, padded]. See `product`."""
    quads = padded // 4
    weights = parts[first]
    for tile in range(start, end):
        packed = tile * padded * TILE
        channel = tile * TILE
        row = 0
        while row + _ROWS <= rows:
            a0, a1, b0, b1 = no_words(), no_words(), no_words(), no_words()
            c0, c1, d0, d1 = no_words(), no_words(), no_words(), no_words()
            base = row * padded
            for quad in range(quads):
                low = load_bytes(weights, packed + quad * 128)
                high = load_bytes(weights, packed + quad * 128 + 64)
                column = base + quad * 4
                four = spread_bytes(x, column)
                a0, a1 = byte_dot_product(a0, four, low), byte_dot_product(a1, four, high)
                four = spread_bytes(x, column + padded)
                b0, b1 = byte_dot_product(b0, four, low), byte_dot_product(b1, four, high)
                four = spread_bytes(x, column + 2 * padded)
                c0, c1 = byte_dot_product(c0, four, low), byte_dot_product(c1, four, high)
                four = spread_bytes(x, column + 3 * padded)
                d0, d1 = byte_dot_product(d0, four, low), byte_dot_product(d1, four, high)
            for index, low, high in ((0, a0, a1), (1, b0, b1), (2, c0, c1), (3, d0, d1)):
                scale, at = load_single(row_scales, row + index), (row + index) * stride + channel
                _store(low, high, parts, first, channel, channels, scale, activation, residual, out, at)
            row += _ROWS
        while row < rows:
            a0, a1, b0, b1 = no_words(), no_words(), no_words(), no_words()
            base = row * padded
            for quad in range(0, quads, 2):
                at = packed + quad * 128
                four = spread_bytes(x, base + quad * 4)
                a0 = byte_dot_product(a0, four, load_bytes(weights, at))
                a1 = byte_dot_product(a1, four, load_bytes(weights, at + 64))
                four = spread_bytes(x, base + quad * 4 + 4)
                b0 = byte_dot_product(b0, four, load_bytes(weights, at + 128))
                b1 = byte_dot_product(b1, four, load_bytes(weights, at + 192))
            low, high = add_words(a0, b0), add_words(a1, b1)
            scale, at = load_single(row_scales, row), row * stride + channel
            _store(low, high, parts, first, channel, channels, scale, activation, residual, out, at)
            row += 1


@_compiled
def product(
    thread, threads, team, x, x_stride, rows, width, parts, first, channels, out, stride, activation,
    residual, scratch,
):
    """out = activation(x @ weights.T + biases) + residual, in int8: what one thread of a team does of it.

    x: float32 [rows, width], out: float32 [rows, channels], with their strides; parts[first] and the three
    behind it: weights (`linear.pack`), corrections (int32), scales and biases (float32), one a channel and
    padded to whole tiles; residual: laid out as out, or 0 for none; scratch: of `product_scratch` bytes.
    """
    padded = _padded(width)
    row_scales, quantized = scratch, scratch + 4 * rows
    start, end = rows * thread // threads, rows * (thread + 1) // threads
    quantize(x, x_stride, start, end, width, quantized, padded, row_scales)
    _meet(team, threads)
    tiles = (channels + TILE - 1) // TILE
    start, end = tiles * thread // threads, tiles * (thread + 1) // threads
    _tiles(
        quantized, row_scales, rows, padded, parts, first, channels, out, stride, activation, residual,
        start, end,
    )
    _meet(team, threads)


@_compiled
def _exponential(x):
    """e to the power of lanes that are not positive."""
    power = multiply(larger(x, spread_single(np.float32(-87))), spread_single(np.float32(_LOG2_E)))
    whole = floor(power)
    part = subtract(power, whole)
    value = spread_single(np.float32(_EXP[7]))
    value = multiply_add(value, part, spread_single(np.float32(_EXP[6])))
    value = multiply_add(value, part, spread_single(np.float32(_EXP[5])))
    value = multiply_add(value, part, spread_single(np.float32(_EXP[4])))
    value = multiply_add(value, part, spread_single(np.float32(_EXP[3])))
    value = multiply_add(value, part, spread_single(np.float32(_EXP[2])))
    value = multiply_add(value, part, spread_single(np.float32(_EXP[1])))
    value = multiply_add(value, part, spread_single(np.float32(_EXP[0])))
    return multiply(value, power_of_two(whole))


@_compiled
def _scores(qkv, query, keys, slab, head_dim, block_tokens):
    """A query with 16 keys of a block."""
    a, b, c, d = no_singles(), no_singles(), no_singles(), no_singles()
    for dim in range(0, head_dim, 4):
        at = slab + dim * block_tokens
        a = multiply_add(spread_single(load_single(qkv, query + dim)), load_singles(keys, at), a)
        at += block_tokens
        b = multiply_add(spread_single(load_single(qkv, query + dim + 1)), load_singles(keys, at), b)
        at += block_tokens
        c = multiply_add(spread_single(load_single(qkv, query + dim + 2)), load_singles(keys, at), c)
        at += block_tokens
        d = multiply_add(spread_single(load_single(qkv, query + dim + 3)), load_singles(keys, at), d)
    return add(add(a, b), add(c, d))


@_compiled
def _attend(qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, start, end):
    """Heads start..end, counted through all rows, over their rows' contexts. See `attend`."""
    stride, out_stride = 3 * heads * head_dim, heads * head_dim
    tables, table_width, row_tables, lengths = rows_of[1], rows_of[2], rows_of[3], rows_of[4]
    longest = np.int64(0)
    for row in range(start // heads, (end + heads - 1) // heads):
        longest = max(longest, load_long(lengths, row))
    room = np.empty(longest + block_tokens, np.float32)
    scores = room.ctypes.data
    slab_size = head_dim * block_tokens
    factor = spread_single(np.float32(1) / np.sqrt(np.float32(head_dim)))
    for row in range(start // heads, (end + heads - 1) // heads):
        length = load_long(lengths, row)
        table = load_long(row_tables, row) * table_width
        blocks = (length + block_tokens - 1) // block_tokens
        padded = blocks * block_tokens
        for head in range(max(start - row * heads, 0), min(end - row * heads, heads)):
            query = row * stride + head * head_dim
            for index in range(blocks):
                slab = (load_long(tables, table + index) * heads + head) * slab_size
                for lane in range(0, block_tokens, LANES):
                    value = _scores(qkv, query, keys, slab + lane, head_dim, block_tokens)
                    store_singles(scores, index * block_tokens + lane, multiply(value, factor))
            for slot in range(length, padded):
                room[slot] = -np.inf
            peaks = load_singles(scores, 0)
            for slot in range(LANES, padded, LANES):
                peaks = larger(peaks, load_singles(scores, slot))
            peak = spread_single(largest(peaks))
            for slot in range(0, padded, LANES):
                store_singles(scores, slot, _exponential(subtract(load_singles(scores, slot), peak)))
            # The smallest exponential is not zero, but a slot beyond the context weighs nothing at all.
            for slot in range(length, padded):
                room[slot] = 0
            sums = no_singles()
            for slot in range(0, padded, LANES):
                sums = add(sums, load_singles(scores, slot))
            share = np.float32(1) / total(sums)
            for dim in range(0, head_dim, 4):
                a, b, c, d = no_singles(), no_singles(), no_singles(), no_singles()
                for index in range(blocks):
                    slab = (load_long(tables, table + index) * heads + head) * slab_size
                    for lane in range(0, block_tokens, LANES):
                        weight = load_singles(scores, index * block_tokens + lane)
                        at = slab + dim * block_tokens + lane
                        a = multiply_add(weight, load_singles(values, at), a)
                        b = multiply_add(weight, load_singles(values, at + block_tokens), b)
                        c = multiply_add(weight, load_singles(values, at + 2 * block_tokens), c)
                        d = multiply_add(weight, load_singles(values, at + 3 * block_tokens), d)
                at = row * out_stride + head * head_dim + dim
                store_single(out, at, total(a) * share)
                store_single(out, at + 1, total(b) * share)
                store_single(out, at + 2, total(c) * share)
                store_single(out, at + 3, total(d) * share)


@_compiled
def attend(thread, threads, team, qkv, rows, heads, head_dim, keys, values, block_tokens, rows_of, out):
    """Stores the rows' keys and values, then attends from each row to its own context: one thread's part.

    qkv: float32 [rows, 3, heads, head_dim]; keys, values: float32 [blocks, heads, head_dim, block_tokens];
    rows_of: `Batch.addresses`; out: float32 [rows, heads, head_dim].
    """
    width = heads * head_dim
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        slot = load_long(rows_of[0], row)
        target = slot // block_tokens * width * block_tokens + slot % block_tokens
        source = row * 3 * width + width
        for entry in range(width):
            at = target + entry * block_tokens
            store_single(keys, at, load_single(qkv, source + entry))
            store_single(values, at, load_single(qkv, source + width + entry))
    _meet(team, threads)
    work = rows * heads
    start, end = work * thread // threads, work * (thread + 1) // threads
    _attend(qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, start, end)
    _meet(team, threads)


@_compiled
def layers(
    thread, threads, team, parts, first, last, hidden, rows, width, ffn, heads, norm_before, keys, values,
    block_tokens, rows_of, scratch,
):
    """The decoder layers first..last, in place on hidden, float32 [rows, width]: one thread's part.

    parts: int64 [layers, 20], of each the addresses of weight and bias of its two norms, then of the products
    qkv, out, fc1 and fc2 as `product` takes them; keys, values: int64 [layers], addresses; scratch: of
    `layers_scratch` bytes; the rest as in `attend`.
    """
    x = scratch
    qkv = x + 4 * rows * width
    wide = qkv + 4 * rows * 3 * width
    rest = wide + 4 * rows * ffn
    # The rows that this thread norms are those that it quantises next: no barrier between.
    start, end = rows * thread // threads, rows * (thread + 1) // threads
    for index in range(first, last):
        at = parts[index]
        source = hidden
        if norm_before:
            norm(hidden, start, end, width, at[0], at[1], x)
            source = x
        product(
            thread, threads, team, source, width, rows, width, at, 4, 3 * width, qkv, 3 * width, NONE, 0, rest
        )
        attend(
            thread, threads, team, qkv, rows, heads, width // heads, keys[index], values[index], block_tokens,
            rows_of, x,
        )
        product(thread, threads, team, x, width, rows, width, at, 8, width, hidden, width, NONE, hidden, rest)
        source = hidden
        if norm_before:
            norm(hidden, start, end, width, at[2], at[3], x)
            source = x
        else:
            norm(hidden, start, end, width, at[0], at[1], hidden)
        product(thread, threads, team, source, width, rows, width, at, 12, ffn, wide, ffn, RELU, 0, rest)
        product(thread, threads, team, wide, ffn, rows, ffn, at, 16, width, hidden, width, NONE, hidden, rest)
        if not norm_before:
            norm(hidden, start, end, width, at[2], at[3], hidden)


@_compiled
def summarize(thread, threads, _team, logits, rows, width, best, summaries):
    """What sampling needs of each row of logits, float32 [rows, width].

    best: int64 [rows], the first of the largest; summaries: float32 [rows, 2], the largest and log-sum-exp.
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
            sums = add(sums, _exponential(subtract(load_singles(logits, base + column), highest)))
        mass = total(sums)
        for column in range(whole, width):
            mass += np.exp(load_single(logits, base + column) - peak)
        store_long(best, row, place)
        store_single(summaries, 2 * row, peak)
        store_single(summaries, 2 * row + 1, peak + np.log(mass))


@_compiled
def _padded(width):
    """A row of bytes ends with a pair of fours."""
    return (width + 7) // 8 * 8


def product_scratch(rows: int, width: int) -> int:
    """Bytes that `product` works on: a scale for each row, and its bytes."""
    return rows * (4 + int(_padded(width)))


def layers_scratch(rows: int, width: int, ffn: int) -> int:
    """Bytes that `layers` works on: states, projections, the feed-forward's middle, the widest product's."""
    return 4 * rows * (4 * width + ffn) + product_scratch(rows, max(width, ffn))
