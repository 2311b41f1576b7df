"""Summarizes a row of logits: the values that sampling and exits need first."""

import numpy as np

from helios.engine.kernels.barrier import share
from helios.engine.kernels.exponential import exponential
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layout import CONFIDENCE, LOGPROB, NORMALIZER, PEAK, SUMMARY
from helios.engine.kernels.simd import (
    LANES,
    add,
    add_words,
    keep,
    lane_numbers,
    larger,
    load_single,
    load_singles,
    no_singles,
    spread_single,
    spread_word,
    store_long,
    store_single,
    store_singles,
    store_words,
    subtract,
    total,
    where_greater,
)


@compiled
def summarize(thread, outputs, rows, width):
    """Summarizes a thread's rows of logits, [rows, width]. The best token is the first of the largest."""
    logits, best, summaries = outputs.logits, outputs.best, outputs.summaries
    whole = width - width % LANES
    room, places = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    start, end = share(thread, rows)
    for row in range(start, end):
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
        store_single(summaries, SUMMARY * row + PEAK, peak)
        store_single(summaries, SUMMARY * row + NORMALIZER, normalizer)
        store_single(summaries, SUMMARY * row + LOGPROB, peak - normalizer)
        store_single(summaries, SUMMARY * row + CONFIDENCE, np.exp(peak - normalizer))
    keep(room)
    keep(places)
