"""The product of rows with a packed linear layer: rows are encoded in its precision, then multiplied.

In bfloat16 each row of the input is rounded. In int8 it is quantised over the row's own range (per token),
and the weights have a scale per output channel. What goes in and comes out is float32. Each row is computed
in an order that no other row changes: its result does not depend on what else is in the batch.
"""

from typing import NamedTuple

import numpy as np

from helios.engine.kernels.barrier import meet, share
from helios.engine.kernels.inner_product import BLOCK_ROWS, STEP_BYTES, TILE, inner_product
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layout import BFLOAT16, INT8, RELU
from helios.engine.kernels.simd import (
    LANES,
    add,
    keep,
    larger,
    largest,
    load_single,
    load_singles,
    load_some,
    load_words,
    multiply,
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


class Encoded(NamedTuple):
    """The input of a product in its precision."""

    rows: int
    # Words of 32 bits, [rows, stride], of which each row uses the first `steps`.
    words: int
    steps: int
    stride: int
    # In int8 what a step of each row's bytes is, and the byte that is zero: float32 [rows, 2].
    row_scales: int


class Result(NamedTuple):
    """Where a product goes: out = activation(sums) + residual, float32 [rows, channels]."""

    out: int
    channels: int
    activation: int
    # Laid out as `out`, which it may be. 0: none.
    residual: int


@compiled
def product(thread, precision, linear, x, rows, out, activation, residual, scratch):
    """out = activation(x @ weights.T + biases) + residual: one thread's part.

    linear: LINEAR; x: float32 [rows, inputs]; out and residual: as in `Result`; scratch: `product_scratch`
    bytes.
    """
    encoded = encoded_at(scratch, precision, rows, linear.inputs)
    encode(thread, precision, x, linear.inputs, encoded)
    meet(thread)
    first, last = share(thread, tiles_of(linear.channels))
    result = Result(out, linear.channels, activation, residual)
    multiply_tiles(precision, linear, encoded, first, last, result)
    meet(thread)


@compiled
def product_scratch(precision, rows, inputs):
    """Bytes that `product` works in: its encoded input."""
    return 4 * rows * (_stride(precision, inputs) + 2)


@compiled
def encoded_at(scratch, precision, rows, inputs):
    """Where the rows of a product's input are encoded: at scratch, in `product_scratch` bytes."""
    stride = _stride(precision, inputs)
    return Encoded(rows, scratch, _steps(precision, inputs), stride, scratch + 4 * rows * stride)


@compiled
def _steps(precision, inputs):
    """Words of a row."""
    if precision == INT8:
        return (inputs + 3) // 4
    return (inputs + 1) // 2 if precision == BFLOAT16 else inputs


@compiled
def _stride(precision, inputs):
    """Words from a row to the next: whole registers, and one more lest rows fall on the same cache lines."""
    return (_steps(precision, inputs) + LANES - 1) // LANES * LANES + LANES


@compiled
def encode(thread, precision, x, inputs, encoded):
    """Encodes a thread's rows of x, float32 [rows, inputs]."""
    start, end = share(thread, encoded.rows)
    for row in range(start, end):
        source, target = x + 4 * row * inputs, encoded.words + 4 * row * encoded.stride
        if precision == INT8:
            _quantize(source, inputs, target, encoded.row_scales + 8 * row)
        elif precision == BFLOAT16:
            for column in range(0, inputs, LANES):
                store_bfloats(target, column, load_some(source, column, inputs - column))
        else:
            for column in range(0, inputs, LANES):
                store_singles(target, column, load_some(source, column, inputs - column))


@compiled
def _quantize(x, inputs, words, scale):
    """A row of float32 at x as unsigned bytes; at scale what a step of them is, and the byte that is zero.

    The bytes span the row's range on both sides of zero. A row that a ReLU left has one side alone, and all
    bytes.
    """
    whole = inputs - inputs % LANES
    highest = larger(load_some(x, whole, inputs - whole), no_singles())
    lowest = larger(subtract(no_singles(), load_some(x, whole, inputs - whole)), no_singles())
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
    for column in range(0, inputs, LANES):
        value = round_to_even(multiply(load_some(x, column, inputs - column), factor))
        store_bytes(words, column, add(value, zeros))


@compiled
def tiles_of(channels):
    """How many tiles that many output channels lie in."""
    return (channels + TILE - 1) // TILE


@compiled
def multiply_tiles(precision, linear, encoded, first, last, result):
    """The tiles first..last of output channels, for all rows."""
    room = np.empty(BLOCK_ROWS * TILE, np.int32)
    sums = room.ctypes.data
    rows, stride, steps = encoded.rows, encoded.stride, encoded.steps
    tile_bytes = steps * STEP_BYTES
    # Blocks of rows that take turns on a tile each fetch their share of the next one, so that memory is read
    # all the time. One block alone reads in order, which the processor fetches ahead by itself.
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    ahead_step = STEP_BYTES // blocks if blocks > 1 else 0
    for tile in range(first, last):
        weights, channel, row = linear.weights + tile * tile_bytes, tile * TILE, 0
        while row < rows:
            count = BLOCK_ROWS
            while count > rows - row:
                count //= 2
            ahead = weights + tile_bytes + row // BLOCK_ROWS * tile_bytes // blocks
            words = encoded.words + 4 * row * stride
            inner_product(precision, count, words, stride, weights, steps, sums, ahead, ahead_step)
            for index in range(count):
                scale, zero = np.float32(1), np.int32(0)
                if precision == INT8:
                    scale = load_single(encoded.row_scales, 2 * row)
                    zero = np.int32(load_single(encoded.row_scales, 2 * row + 1))
                for half in range(0, TILE, LANES):
                    place = index * TILE + half
                    _store(precision, linear, sums, place, row, channel + half, scale, zero, result)
                row += 1
    keep(room)


@compiled
def _store(precision, linear, sums, place, row, channel, row_scale, zero, result):
    """Takes a register of sums to where it goes: scaled, biased, activated, added."""
    if precision == INT8:
        # Zero is a byte of its own in each row: what it adds to the sums is taken off.
        added = multiply_words(load_words(linear.weight_sums, channel), spread_word(zero))
        corrected = subtract_words(load_words(sums, place), added)
        scale = multiply(load_singles(linear.scales, channel), spread_single(row_scale))
        value = multiply(to_singles(corrected), scale)
    else:
        value = load_singles(sums, place)
    value = add(value, load_singles(linear.biases, channel))
    if result.activation == RELU:
        value = larger(value, no_singles())
    at, count = row * result.channels + channel, result.channels - channel
    if result.residual != 0:
        value = add(value, load_some(result.residual, at, count))
    store_some(result.out, at, count, value)
