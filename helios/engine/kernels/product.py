"""Multiplies rows by a packed linear layer: encodes the rows in its precision, then multiplies.

In bfloat16 each row of the input is rounded. In int8 it is quantised over the row's own range (per token),
and the weights have a scale per output channel. Or both have a scale for each group of inputs. Input and
output are float32. No other row changes the order of a row's sums, so its result does not depend on the rest
of the batch.
"""

from typing import NamedTuple

import numpy as np

from helios.engine.kernels.barrier import meet, share
from helios.engine.kernels.exponential import exponential
from helios.engine.kernels.inner_product import (
    BLOCK_ROWS,
    GROUP,
    GROUP_BYTES,
    STEP_BYTES,
    TILE,
    grouped_product,
    inner_product,
)
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layout import ALONE, BFLOAT16, GATE, INT8, NONE, RELU
from helios.engine.kernels.simd import (
    LANES,
    absolute,
    add,
    divide,
    keep,
    larger,
    largest,
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
    store_single,
    store_singles,
    store_some,
    subtract,
    subtract_words,
    to_singles,
)

# A single block of rows prefetches weights this far ahead, where they have groups. That is beyond the page
# that it reads, which the processor's own prefetching does not leave.
_AHEAD_BYTES = 8192
# Up to this many threads may each encode a single row by themselves, and so need not wait for each other.
COPIES = 16
# A group whose largest number is smaller counts as all zeros, because its inverse would be infinite.
LEAST = 1e-30


class Encoded(NamedTuple):
    """The input of a product, encoded in its precision."""

    rows: int
    # 32-bit words, [rows, stride]. Each row uses the first `steps` of its words.
    words: int
    steps: int
    stride: int
    # Only in int8. Without groups, each row's scale and zero byte, float32 [rows, 2]. With groups, as in
    # `grouped_product`.
    row_scales: int


class Result(NamedTuple):
    """Destination of a product: out = activation(sums) + residual, float32 [rows, width]."""

    out: int
    width: int
    activation: int
    # Same layout as `out`, and may be the same memory. 0: no residual.
    residual: int


@compiled
def plain(linear, out):
    """The result of a product without activation and residual."""
    return Result(out, linear.channels, NONE, 0)


@compiled
def product(thread, precision, linear, x, rows, result, scratch, is_copied=False):
    """One thread's part of `result` = activation(x @ weights.T + biases) + residual.

    Each thread reads only its own rows of x. But with is_copied (`can_copy`) it reads the single row, which
    it has computed itself or which was there before the last barrier.
    linear: LINEAR; x: float32 [rows, inputs]; result: `Result`; scratch: `product_scratch` bytes.
    """
    if is_copied:
        own = scratch + thread.number * encoded_bytes(precision, 1, linear.inputs)
        encoded = encoded_at(own, precision, 1, linear)
        encode(ALONE, precision, x, linear, encoded)
    else:
        encoded = encoded_at(scratch, precision, rows, linear)
        encode(thread, precision, x, linear, encoded)
        meet(thread)
    first, last = share(thread, tiles_of(linear.channels))
    multiply_tiles(precision, linear, encoded, first, last, result)
    meet(thread)


@compiled
def product_scratch(precision, rows, inputs):
    """Bytes of work space of `product`: its encoded input, or copies of a single row."""
    return encoded_bytes(precision, max(rows, COPIES), inputs)


@compiled
def can_copy(thread, rows):
    """Whether each thread can encode the input of a product by itself: a single row."""
    return rows == 1 and thread.threads <= COPIES


@compiled
def encoded_bytes(precision, rows, inputs):
    """Bytes of encoded rows, which may have groups."""
    whole = (inputs + GROUP - 1) // GROUP * GROUP
    return 4 * rows * (_stride(_steps(precision, whole)) + 2 * whole // GROUP)


@compiled
def encoded_at(scratch, precision, rows, linear):
    """The encoded input of a product, placed at scratch in `product_scratch` bytes."""
    steps = linear.groups * GROUP // 4 if linear.groups else _steps(precision, linear.inputs)
    stride = _stride(steps)
    return Encoded(rows, scratch, steps, stride, scratch + 4 * rows * stride)


@compiled
def _steps(precision, inputs):
    """Words per row."""
    if precision == INT8:
        return (inputs + 3) // 4
    return (inputs + 1) // 2 if precision == BFLOAT16 else inputs


@compiled
def _stride(steps):
    """Words from one row to the next: whole registers plus one, so that rows do not share cache sets."""
    return (steps + LANES - 1) // LANES * LANES + LANES


@compiled
def encode(thread, precision, x, linear, encoded):
    """Encodes a thread's rows of x, float32 [rows, inputs]."""
    inputs, groups = linear.inputs, linear.groups
    start, end = share(thread, encoded.rows)
    for row in range(start, end):
        source, target = x + 4 * row * inputs, encoded.words + 4 * row * encoded.stride
        if groups:
            _quantize_groups(source, inputs, groups, target, encoded.row_scales + 8 * row * groups)
        elif precision == INT8:
            _quantize(source, inputs, target, encoded.row_scales + 8 * row)
        elif precision == BFLOAT16:
            for column in range(0, inputs, LANES):
                store_bfloats(target, column, load_some(source, column, inputs - column))
        else:
            for column in range(0, inputs, LANES):
                store_singles(target, column, load_some(source, column, inputs - column))


@compiled
def _quantize(x, inputs, words, scale):
    """Encodes a row of float32 at x as unsigned bytes. Stores its scale and its zero byte at scale.

    The range of the bytes covers the row's values and zero. A row after a ReLU has no negative values and so
    uses all bytes for the positive side.
    """
    whole = inputs - inputs % LANES
    highest = larger(load_some(x, whole, inputs - whole), no_singles())
    lowest = larger(subtract(no_singles(), load_some(x, whole, inputs - whole)), no_singles())
    for column in range(0, whole, LANES):
        value = load_singles(x, column)
        highest, lowest = larger(highest, value), larger(lowest, subtract(no_singles(), value))
    below = largest(lowest)
    # 254 instead of 255, because both ends may be rounded away from zero.
    span = (largest(highest) + below) / np.float32(254)
    inverse = np.float32(1) / span if span > np.float32(0) else np.float32(0)
    zero = np.rint(below * inverse)
    store_single(scale, 0, span)
    store_single(scale, 1, zero)
    factor, zeros = spread_single(inverse), spread_single(zero)
    for column in range(0, inputs, LANES):
        value = round_to_even(multiply(load_some(x, column, inputs - column), factor))
        store_bytes(words, column, add(value, zeros))


@compiled
def _quantize_groups(x, inputs, groups, words, scales):
    """Encodes a row of float32 at x as unsigned bytes, each group over its own range.

    scales: the scale and the offset of each group, as in `grouped_product`.
    """
    for group in range(groups):
        start = group * GROUP
        highest, lowest = no_singles(), no_singles()
        for column in range(start, start + GROUP, LANES):
            value = load_some(x, column, inputs - column)
            highest, lowest = larger(highest, value), larger(lowest, subtract(no_singles(), value))
        below = largest(lowest)
        # 254 instead of 255, because both ends may be rounded away from zero.
        span = (largest(highest) + below) / np.float32(254)
        inverse = np.float32(1) / span if span > np.float32(LEAST) else np.float32(0)
        zero = np.rint(below * inverse)
        factor, zeros = spread_single(inverse), spread_single(zero)
        for column in range(start, start + GROUP, LANES):
            value = round_to_even(multiply(load_some(x, column, inputs - column), factor))
            store_bytes(words, column, add(value, zeros))
        store_single(scales, 2 * group, span)
        store_single(scales, 2 * group + 1, -zero * span)


@compiled
def tiles_of(channels):
    """Number of tiles that hold this many output channels."""
    return (channels + TILE - 1) // TILE


@compiled
def multiply_tiles(precision, linear, encoded, first, last, result):
    """Computes the tiles first..last of output channels for all rows."""
    room = np.empty(BLOCK_ROWS * TILE, np.int32)
    sums = room.ctypes.data
    rows, stride, steps = encoded.rows, encoded.stride, encoded.steps
    groups = linear.groups
    # Whether the sums are integers, to be scaled afterwards.
    is_whole = precision == INT8 and groups == 0
    tile_bytes = groups * GROUP_BYTES if groups else steps * STEP_BYTES
    # Several blocks of rows use each tile in turn. Each block prefetches its share of the next tile, so that
    # memory is read all the time. A single block reads in order, and the processor prefetches that by itself.
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    ahead_step = STEP_BYTES // blocks if blocks > 1 or groups else 0
    for tile in range(first, last):
        weights, channel, row = linear.weights + tile * tile_bytes, tile * TILE, 0
        while row < rows:
            count = BLOCK_ROWS
            while count > rows - row:
                count //= 2
            ahead = weights + tile_bytes + row // BLOCK_ROWS * tile_bytes // blocks
            if blocks == 1 and groups:
                ahead = weights + _AHEAD_BYTES
            words = encoded.words + 4 * row * stride
            if groups:
                scales = encoded.row_scales + 8 * row * groups
                grouped_product(count, words, stride, scales, weights, groups, sums, ahead, ahead_step)
            else:
                inner_product(precision, count, words, stride, weights, steps, sums, ahead, ahead_step)
            for index in range(count):
                scale, zero = np.float32(1), np.int32(0)
                if is_whole:
                    scale = load_single(encoded.row_scales, 2 * row)
                    zero = np.int32(load_single(encoded.row_scales, 2 * row + 1))
                place = index * TILE
                first_half = _value(is_whole, linear, sums, place, channel, scale, zero)
                second_half = _value(is_whole, linear, sums, place + LANES, channel + LANES, scale, zero)
                if result.activation == GATE:
                    gated = multiply(_silu(first_half), second_half)
                    _store(gated, row, tile * LANES, result)
                else:
                    _store(first_half, row, channel, result)
                    _store(second_half, row, channel + LANES, result)
                row += 1
    keep(room)


@compiled
def _value(is_whole, linear, sums, place, channel, row_scale, zero):
    """A register of sums after scale and bias."""
    if is_whole:
        # Each row has its own zero byte. Its contribution to the sums is subtracted.
        added = multiply_words(load_words(linear.weight_sums, channel), spread_word(zero))
        corrected = subtract_words(load_words(sums, place), added)
        scale = multiply(load_singles(linear.scales, channel), spread_single(row_scale))
        value = multiply(to_singles(corrected), scale)
    else:
        value = load_singles(sums, place)
    return add(value, load_singles(linear.biases, channel))


@compiled
def _silu(x):
    """x times its sigmoid (Hendrycks and Gimpel 2016)."""
    positive, power = larger(x, no_singles()), exponential(subtract(no_singles(), absolute(x)))
    # No power is above 1, so none overflows.
    value = multiply_add(subtract(x, positive), power, positive)
    return divide(value, add(spread_single(np.float32(1)), power))


@compiled
def _store(value, row, channel, result):
    """Stores a register of results after activation and residual."""
    if result.activation == RELU:
        value = larger(value, no_singles())
    at, count = row * result.width + channel, result.width - channel
    if result.residual != 0:
        value = add(value, load_some(result.residual, at, count))
    store_some(result.out, at, count, value)
