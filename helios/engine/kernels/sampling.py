"""Chooses tokens from rows of logits: penalty, temperature, top-k, nucleus and draw.

A row's token depends only on its logits, parameters, seed and position, and no other row changes the order of
its sums. `sampler.py` does the same in torch, for other devices.
"""

import numpy as np

from helios.engine.kernels.barrier import share
from helios.engine.kernels.exponential import exponential
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layout import LOGPROB, NORMALIZER, SUMMARY
from helios.engine.kernels.simd import (
    LANES,
    add,
    bits_of,
    lanes_between,
    larger,
    largest,
    load_long,
    load_single,
    load_singles,
    load_some,
    multiply,
    no_singles,
    single_of,
    spread_single,
    store_long,
    store_single,
    store_singles,
    subtract,
    total,
    where_above,
)

# Weights of lower scores are zero, because float32 has no smaller normal number.
_NOTHING = -87.0
# The largest factor of scores. The smallest temperatures use it too.
_STEEPEST = 1e38
# Weights that are summed at once while searching for the drawn one.
_CHUNK = 16 * LANES
# A guess: the smallest weight that is kept is rarely below this one.
_UNLIKELY = 2.0**-20
# Distance in bits of two float32. Few weights lie between numbers this close, so only these weights are
# searched from then on.
_NEAR = 2 << 23


@compiled
def uniform(seed, position):
    """A number in [0, 1) that depends only on (seed, position) (splitmix64, Steele et al. 2014)."""
    x = np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
    x += (np.uint64(position) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float64((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@compiled
def drawing_numbers(width):
    """Float32 numbers that a thread draws with: all weights and a part of them, in whole registers."""
    return 2 * _whole(width)


@compiled
def _whole(width):
    return (width + LANES - 1) // LANES * LANES


@compiled
def _peak(logits, width):
    """The largest logit."""
    peaks = spread_single(np.float32(-np.inf))
    whole = width - width % LANES
    for column in range(0, whole, LANES):
        peaks = larger(peaks, load_singles(logits, column))
    peak = largest(peaks)
    for column in range(whole, width):
        peak = max(peak, load_single(logits, column))
    return peak


@compiled
def _first(logits, width, value):
    """Index of the first occurrence of a value, or -1."""
    for column in range(width):
        if load_single(logits, column) == value:
            return column
    return -1


@compiled
def _penalize(logits, token, penalty, out):
    """Stores a token's logit with the repetition penalty (Keskar et al. 2019) at the token's place in out."""
    logit = load_single(logits, token)
    store_single(out, token, logit / penalty if logit > 0 else logit * penalty)


@compiled
def _weigh(logits, width, temperature, weights):
    """Stores exp((logit - largest) / temperature) of each logit, then zeros. weights may be logits."""
    # The factor is finite, so that the largest logit minus itself stays zero for any small temperature.
    factor = spread_single(np.float32(min(1 / temperature, _STEEPEST)))
    highest = spread_single(_peak(logits, width))
    nothing = spread_single(np.float32(_NOTHING))
    for column in range(0, width, LANES):
        score = multiply(subtract(load_some(logits, column, width - column), highest), factor)
        store_singles(weights, column, where_above(score, nothing, exponential(score)))
    for column in range(width, _whole(width)):
        store_single(weights, column, np.float32(0))


@compiled
def _above(weights, count, least, by_mass):
    """The sum of the weights above `least`, or their count. count: in whole registers."""
    limit, one = spread_single(least), spread_single(np.float32(1))
    sums = no_singles()
    for column in range(0, count, LANES):
        value = load_singles(weights, column)
        sums = add(sums, where_above(value, limit, value if by_mass else one))
    return total(sums)


@compiled
def _gather(weights, count, low, high, room):
    """Stores the weights in (low, high] in room, followed by zeros. Returns how many numbers it wrote."""
    lowest, highest, found = spread_single(low), spread_single(high), 0
    for column in range(0, count, LANES):
        lanes, place = lanes_between(load_singles(weights, column), lowest, highest), column
        while lanes:
            if lanes & 1:
                store_single(room, found, load_single(weights, place))
                found += 1
            lanes >>= 1
            place += 1
    for place in range(found, _whole(found)):
        store_single(room, place, np.float32(0))
    return _whole(found)


@compiled
def _least(weights, count, limit, by_mass, room):
    """The smallest weight for which the weights above it sum up to less than `limit`, or are fewer.

    It is found by bisection of bits, because positive floats have the same order as their bits.
    """
    if _above(weights, count, np.float32(0), by_mass) < limit:
        return np.float32(0)
    low, high, middle = 0, bits_of(np.float32(1)), bits_of(np.float32(_UNLIKELY))
    beyond, gathered = np.float32(0), False
    above_high = np.float32(0)
    while high - low > 1:
        found = beyond + _above(weights, count, single_of(middle), by_mass)
        if found < limit:
            high, above_high = middle, found
        else:
            low = middle
        if high - low <= _NEAR and not gathered:
            count = _gather(weights, count, single_of(low), single_of(high), room)
            weights, beyond, gathered = room, above_high, True
        middle = low + (high - low) // 2
    return single_of(high)


@compiled
def _keep_from(weights, count, least):
    """Sets weights below `least` to zero."""
    limit = spread_single(least)
    for column in range(0, count, LANES):
        value = load_singles(weights, column)
        store_singles(weights, column, subtract(value, where_above(limit, value, value)))


@compiled
def _find(weights, width, number, room):
    """The first index at which the running sum of the weights exceeds `number` times their total.

    Returns -1 if all are zero or any is NaN.
    """
    count, mass = _whole(width), 0.0
    for start in range(0, count, _CHUNK):
        sums = no_singles()
        for column in range(start, min(start + _CHUNK, count), LANES):
            sums = add(sums, load_singles(weights, column))
        part = total(sums)
        store_single(room, start // _CHUNK, part)
        mass += part
    target, before, last = number * mass, 0.0, -1
    for start in range(0, count, _CHUNK):
        part = load_single(room, start // _CHUNK)
        if part > 0:
            # Because of rounding no sum may exceed the target. Then it lies in the last chunk that has
            # weights.
            last = start
            if before + part > target:
                break
            before += part
    if last < 0:
        return -1
    found = -1
    for column in range(last, min(last + _CHUNK, width)):
        weight = load_single(weights, column)
        if weight > 0:
            found = column
            before += weight
            if before > target:
                break
    return found


@compiled
def _choose(logits, width, temperature, top_k, top_p, number, room):
    """The token that a number in [0, 1) draws from logits, float32 [width]. -1 if they are NaN.

    room: `drawing_numbers` float32. The logits may lie at its beginning.
    """
    weights, count = room, _whole(width)
    rest = room + 4 * count
    _weigh(logits, width, temperature, weights)
    if 0 < top_k < width:
        _keep_from(weights, count, _least(weights, count, np.float32(top_k), False, rest))
    if top_p < 1:
        mass = _above(weights, count, np.float32(0), True)
        _keep_from(weights, count, _least(weights, count, np.float32(top_p * mass), True, rest))
    return _find(weights, width, number, rest)


@compiled
def draw(thread, draws, later, outputs, rows, width, room):
    """Draws tokens from a thread's rows of logits, [rows, width]. They replace the most likely ones.

    draws: `layout.Draws`; later: index of the step in its burst. The tokens of earlier steps also count as
    history; they lie before `outputs.best`, [rows] each. outputs: what `summarize` wrote. The summary's
    log-probability becomes that of the drawn token, without penalty and temperature. room: float32 [threads,
    `drawing_numbers`].
    """
    best, summaries = outputs.best, outputs.summaries
    own = room + 4 * thread.number * drawing_numbers(width)
    start, end = share(thread, rows)
    for row in range(start, end):
        chosen = draws.rows[row]
        temperature, penalty = chosen.temperature, np.float32(chosen.repetition_penalty)
        if temperature == 0 and penalty == 1:
            continue
        of_row = outputs.logits + 4 * row * width
        source = of_row
        if penalty != 1:
            source = own
            for column in range(0, width, LANES):
                store_singles(own, column, load_some(of_row, column, width - column))
            for place in range(draws.rows[row - 1].history_end if row else 0, chosen.history_end):
                _penalize(of_row, draws.history[place], penalty, own)
            for before in range(1, later + 1):
                _penalize(of_row, load_long(best, row - before * rows), penalty, own)
        if temperature == 0:
            token = _first(source, width, _peak(source, width))
        else:
            number = uniform(chosen.seed, chosen.position + later)
            token = _choose(source, width, temperature, chosen.top_k, chosen.top_p, number, own)
        if token >= 0:
            store_long(best, row, token)
            logprob = load_single(of_row, token) - load_single(summaries, SUMMARY * row + NORMALIZER)
            store_single(summaries, SUMMARY * row + LOGPROB, logprob)
