"""Quantises weights to int8 with a scale for each group of a row's numbers."""

import numpy as np

from helios.engine.kernels.inner_product import GROUP
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.simd import (
    LANES,
    add_words,
    bits_of,
    divide,
    keep,
    lane_numbers,
    load_single,
    load_singles,
    load_some,
    multiply,
    multiply_add,
    multiply_words,
    no_singles,
    round_to_even,
    spread_single,
    spread_word,
    store_bytes,
    store_single,
    store_singles,
    store_words,
    subtract,
)

# The distance of two bfloat16 numbers in the bits of a float32.
_NEXT = 1 << 16
# A group whose largest number is smaller counts as all zeros.
_LEAST = 1e-30


@compiled
def quantize_groups(rows, inputs, x, numbers, scales):
    """Rounds rows of float32 at x, [rows, inputs], to int8 at numbers, [rows, groups, GROUP].

    Rows are padded with zeros. scales: float32 [rows, groups], which are bfloat16 numbers. Each is chosen so
    that the squares of its group's errors have the smallest sum. That matters most for weights that were
    quantised before.
    """
    room = np.empty(2 * LANES, np.float32)
    groups = (inputs + GROUP - 1) // GROUP
    for row in range(rows):
        for group in range(groups):
            start, count = row * inputs + group * GROUP, inputs - group * GROUP
            target = row * groups + group
            scale = _best_scale(x + 4 * start, min(GROUP, count), room.ctypes.data)
            store_single(scales, target, scale)
            factor = spread_single(np.float32(1) / scale)
            for column in range(0, GROUP, LANES):
                value = round_to_even(multiply(load_some(x, start + column, count - column), factor))
                store_bytes(numbers, target * GROUP + column, value)
    keep(room)


@compiled
def _best_scale(x, count, room):
    """The best scale of `count` float32. Tries the 16 smallest with which no number exceeds 127.

    room: space for 32 float32.
    """
    peak = np.float32(_LEAST)
    for column in range(count):
        peak = max(peak, abs(load_single(x, column)))
    bits = (bits_of(peak / np.float32(127)) + _NEXT - 1) // _NEXT * _NEXT
    # Each lane tries one scale.
    distances = multiply_words(lane_numbers(), spread_word(np.int32(_NEXT)))
    store_words(room, 0, add_words(spread_word(np.int32(bits)), distances))
    scales, errors = load_singles(room, 0), no_singles()
    factors = divide(spread_single(np.float32(1)), scales)
    for column in range(count):
        value = spread_single(load_single(x, column))
        error = subtract(multiply(round_to_even(multiply(value, factors)), scales), value)
        errors = multiply_add(error, error, errors)
    store_singles(room, LANES, errors)
    best = 0
    for lane in range(1, LANES):
        if load_single(room, LANES + lane) < load_single(room, LANES + best):
            best = lane
    return load_single(room, best)
