"""Attention over paged KV in int8: byte products, like those with the weights.

`KVCache` describes the layout of keys and values. Per token and head, each half of the key and the value have
a scale, with which the largest number becomes 127. A query is rounded to bytes like a key. The weights of a
row's values are multiplied by the values' scales, rounded to 16 bits and multiplied as two bytes. All sums
of products are integers. So a row's result is bit-identical whatever other rows are in the batch, and
whatever the order of summation.
"""

import numpy as np

from helios.engine.kernels.barrier import share
from helios.engine.kernels.context import (
    are_of_one_sequence,
    block_table,
    context_tokens,
    first_block_after,
    longest_context,
)
from helios.engine.kernels.exponential import exponential
from helios.engine.kernels.inner_product import multiply_bytes
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.product import LEAST
from helios.engine.kernels.rotation import place_key, place_queries
from helios.engine.kernels.simd import (
    LANES,
    absolute,
    add,
    add_words,
    both_of,
    either_of,
    fetch_kept,
    keep,
    larger,
    largest,
    load_long,
    load_single,
    load_singles,
    load_some,
    load_word,
    load_words,
    multiply,
    multiply_add,
    no_singles,
    no_words,
    round_to_even,
    shift_left,
    shift_right,
    spread_single,
    spread_word,
    store_bytes,
    store_low_bytes,
    store_single,
    store_singles,
    store_some,
    store_word,
    store_words,
    subtract,
    to_singles,
    to_words,
    total,
    total_words,
)

# Bytes of a word, the unit of a product.
_TOGETHER = 4
# The byte that stands for zero in keys: one side of a product must be unsigned.
_MIDDLE = 128
# The largest weight as two bytes. Its products fit 32-bit sums for contexts up to 66,000 tokens.
_MOST = 65535


@compiled
def key_bytes(head_dim, block_tokens):
    """Bytes of a head's keys in a block, [head_dim / 4, tokens, 4], and of the scales, [3, tokens]."""
    return _words(head_dim) * block_tokens * _TOGETHER + 12 * block_tokens


@compiled
def value_bytes(head_dim, block_tokens):
    """Bytes of a head's values in a block: [tokens / 4, head_dim in whole registers, 4]."""
    return _words(block_tokens) * _whole(head_dim) * _TOGETHER


@compiled
def _words(numbers):
    """Words that hold this many bytes."""
    return (numbers + _TOGETHER - 1) // _TOGETHER


@compiled
def _whole(head_dim):
    """The dimensions of a head, rounded up to whole registers."""
    return (head_dim + LANES - 1) // LANES * LANES


@compiled
def first_half(head_dim):
    """The dimensions of a key's first half, in whole registers. With few, it is the whole key."""
    return min(head_dim, (head_dim // 2 + LANES - 1) // LANES * LANES)


@compiled
def _peak(x, at, count):
    """The largest absolute value of `count` float32."""
    whole = count - count % LANES
    peaks = no_singles()
    if whole < count:
        peaks = absolute(load_some(x, at + whole, count - whole))
    for entry in range(0, whole, LANES):
        peaks = larger(peaks, absolute(load_singles(x, at + entry)))
    return largest(peaks)


@compiled
def _inverse(peak, most):
    """The factor that scales numbers up to `peak` to integers up to `most`."""
    return np.float32(most) / peak if peak > np.float32(LEAST) else np.float32(0)


@compiled
def _load(x, at, count):
    """The first 16 of `count` float32, padded with zeros if there are fewer."""
    return load_singles(x, at) if count >= LANES else load_some(x, at, count)


@compiled
def remember_int8(thread, attention, rows, slots, positions, qkv):
    """Stores the keys and values of a thread's share of the heads. Arguments: as in `attention.remember`.

    Work is not shared by rows, because neighbouring tokens share words.
    """
    head_dim, block_tokens, kv_heads = attention.head_dim, attention.block_tokens, attention.kv_heads
    keys, values = attention.keys, attention.values
    queries, width, whole = attention.heads * head_dim, kv_heads * head_dim, _whole(head_dim)
    first, last = share(thread, kv_heads)
    slab_of_keys, slab_of_values = key_bytes(head_dim, block_tokens), value_bytes(head_dim, block_tokens)
    room = np.empty(LANES // _TOGETHER, np.int32)
    own = room.ctypes.data
    middle, byte = spread_single(np.float32(_MIDDLE)), spread_word(np.int32(255))
    for row in range(rows):
        slot = load_long(slots, row)
        block, token = slot // block_tokens * kv_heads, slot % block_tokens
        # The token's byte position in its word, and a mask of the other bytes.
        row_word, shift = token // _TOGETHER * whole, spread_word(np.int32(8 * (token % _TOGETHER)))
        others = spread_word(np.int32(~(255 << (8 * (token % _TOGETHER)))))
        for head in range(first, last):
            key = row * (queries + 2 * width) + queries + head * head_dim
            place_key(attention, load_long(positions, row), qkv + 4 * key)
            slab = keys + (block + head) * slab_of_keys
            scales = slab + slab_of_keys - 12 * block_tokens
            start, end = 0, first_half(head_dim)
            for part in range(2):
                peak = _peak(qkv, key + start, end - start)
                store_single(scales, part * block_tokens + token, peak / np.float32(127))
                factor = spread_single(_inverse(peak, 127))
                for dim in range(start, end, LANES):
                    count = end - dim
                    value = round_to_even(multiply(_load(qkv, key + dim, count), factor))
                    store_bytes(own, 0, add(value, middle))
                    at = dim // _TOGETHER * block_tokens + token
                    for word in range(_words(min(LANES, count))):
                        store_word(slab, at + word * block_tokens, load_word(own, word))
                start, end = end, head_dim
            value_at = key + width
            slab = values + (block + head) * slab_of_values
            peak = _peak(qkv, value_at, head_dim)
            store_single(scales, 2 * block_tokens + token, peak / np.float32(127))
            factor = spread_single(_inverse(peak, 127))
            for dim in range(0, head_dim, LANES):
                value = multiply(_load(qkv, value_at + dim, head_dim - dim), factor)
                added = shift_left(both_of(to_words(round_to_even(value)), byte), shift)
                kept = both_of(load_words(slab, row_word + dim), others)
                store_words(slab, row_word + dim, either_of(kept, added))
    keep(room)


@compiled
def _quantize_query(qkv, query, head_dim, out, factors):
    """Rounds a head's query to bytes at out.

    factors: for each half its scale, divided by the root of head_dim, and, in the 16 words from the 16th on,
    what dot products with keys begin with, because of the keys' zero byte: [2, 32].
    """
    root = np.float32(1) / np.sqrt(np.float32(head_dim))
    start, end = 0, first_half(head_dim)
    for part in range(2):
        peak = _peak(qkv, query + start, end - start)
        factor = spread_single(_inverse(peak, 127))
        sums = no_words()
        for dim in range(start, end, LANES):
            value = to_words(round_to_even(multiply(_load(qkv, query + dim, end - dim), factor)))
            store_low_bytes(out, dim, value)
            sums = add_words(sums, value)
        store_single(factors, part * 2 * LANES, peak / np.float32(127) * root)
        beginning = spread_word(np.int32(-_MIDDLE * total_words(sums)))
        store_words(factors, (2 * part + 1) * LANES, beginning)
        start, end = end, head_dim


@compiled
def _scaled(first, second, scales, other_scales, factors):
    """16 scores, from the dot products of both halves, the keys' scales and the query's factors."""
    factor = spread_single(load_single(factors, 0))
    other_factor = spread_single(load_single(factors, 2 * LANES))
    value = multiply(to_singles(first), multiply(scales, factor))
    return multiply_add(to_singles(second), multiply(other_scales, other_factor), value)


@compiled
def _store_scores(query, slab, lane, head_dim, block_tokens, factors, scores, at):
    """Stores a query's scores of 16 keys of a block. factors: as in `_quantize_query`."""
    middle, words = _words(first_half(head_dim)), _words(head_dim)
    a0, a1 = load_words(factors, LANES), load_words(factors, 3 * LANES)
    # Where the keys' words lie, those of the first half and those of the second, which has no more.
    place, other = lane, middle * block_tokens + lane
    for word in range(words - middle):
        a0 = multiply_bytes(a0, load_words(slab, place), spread_word(load_word(query, word)))
        a1 = multiply_bytes(a1, load_words(slab, other), spread_word(load_word(query, middle + word)))
        place += block_tokens
        other += block_tokens
    for word in range(words - middle, middle):
        a0 = multiply_bytes(a0, load_words(slab, place), spread_word(load_word(query, word)))
        place += block_tokens
    own = words * block_tokens + lane
    key_scales, other_scales = load_singles(slab, own), load_singles(slab, own + block_tokens)
    store_singles(scores, at, _scaled(a0, a1, key_scales, other_scales, factors))


@compiled
def _store_scores_of_four(query, stride, slab, lane, head_dim, block_tokens, factors, scores, at, room):
    """`_store_scores` for four queries, `stride` bytes apart. Their scores are `room` numbers apart."""
    middle, words = _words(first_half(head_dim)), _words(head_dim)
    second, third, fourth = query + stride, query + 2 * stride, query + 3 * stride
    of_second, of_third, of_fourth = factors + 16 * LANES, factors + 32 * LANES, factors + 48 * LANES
    a0, a1 = load_words(factors, LANES), load_words(factors, 3 * LANES)
    b0, b1 = load_words(of_second, LANES), load_words(of_second, 3 * LANES)
    c0, c1 = load_words(of_third, LANES), load_words(of_third, 3 * LANES)
    d0, d1 = load_words(of_fourth, LANES), load_words(of_fourth, 3 * LANES)
    place, other = lane, middle * block_tokens + lane
    for word in range(words - middle):
        keys = load_words(slab, place)
        a0 = multiply_bytes(a0, keys, spread_word(load_word(query, word)))
        b0 = multiply_bytes(b0, keys, spread_word(load_word(second, word)))
        c0 = multiply_bytes(c0, keys, spread_word(load_word(third, word)))
        d0 = multiply_bytes(d0, keys, spread_word(load_word(fourth, word)))
        keys = load_words(slab, other)
        a1 = multiply_bytes(a1, keys, spread_word(load_word(query, middle + word)))
        b1 = multiply_bytes(b1, keys, spread_word(load_word(second, middle + word)))
        c1 = multiply_bytes(c1, keys, spread_word(load_word(third, middle + word)))
        d1 = multiply_bytes(d1, keys, spread_word(load_word(fourth, middle + word)))
        place += block_tokens
        other += block_tokens
    for word in range(words - middle, middle):
        keys = load_words(slab, place)
        a0 = multiply_bytes(a0, keys, spread_word(load_word(query, word)))
        b0 = multiply_bytes(b0, keys, spread_word(load_word(second, word)))
        c0 = multiply_bytes(c0, keys, spread_word(load_word(third, word)))
        d0 = multiply_bytes(d0, keys, spread_word(load_word(fourth, word)))
        place += block_tokens
    own = words * block_tokens + lane
    key_scales, other_scales = load_singles(slab, own), load_singles(slab, own + block_tokens)
    store_singles(scores, at, _scaled(a0, a1, key_scales, other_scales, factors))
    store_singles(scores, at + room, _scaled(b0, b1, key_scales, other_scales, of_second))
    store_singles(scores, at + 2 * room, _scaled(c0, c1, key_scales, other_scales, of_third))
    store_singles(scores, at + 3 * room, _scaled(d0, d1, key_scales, other_scales, of_fourth))


@compiled
def _weigh(scores, scales, length, padded, upper, lower):
    """Turns a row's scores into softmax weights of its slots, times the values' scales, as two bytes.

    Returns the scale of the lower bytes.
    """
    for slot in range(length, padded):
        store_single(scores, slot, np.float32(-np.inf))
    peaks = load_singles(scores, 0)
    for slot in range(LANES, padded, LANES):
        peaks = larger(peaks, load_singles(scores, slot))
    peak, sums, most = spread_single(largest(peaks)), no_singles(), no_singles()
    for slot in range(0, padded, LANES):
        value = exponential(subtract(load_singles(scores, slot), peak))
        if slot + LANES > length:
            # The smallest exponential is not zero, so slots beyond the context are set to zero here.
            store_singles(scores, slot, value)
            for beyond in range(length, slot + LANES):
                store_single(scores, beyond, np.float32(0))
            value = load_singles(scores, slot)
        sums = add(sums, value)
        value = multiply(value, load_singles(scales, slot))
        most = larger(most, value)
        store_singles(scores, slot, value)
    highest = largest(most)
    factor, byte = spread_single(_inverse(highest, _MOST)), spread_word(np.int32(8))
    for slot in range(0, padded, LANES):
        weight = to_words(round_to_even(multiply(load_singles(scores, slot), factor)))
        store_low_bytes(upper, slot, shift_right(weight, byte))
        store_low_bytes(lower, slot, weight)
    return highest / np.float32(_MOST) / total(sums)


@compiled
def _store(upper, lower, factor, out, at, count):
    """Combines the sums of the upper and the lower bytes of the weights and stores them as float32."""
    value = multiply_add(to_singles(upper), spread_single(np.float32(256)), to_singles(lower))
    store_some(out, at, count, multiply(value, spread_single(factor)))


@compiled
def _copy_scales(slab, slab_bytes, block_tokens, scales, slot):
    """Copies the scales of a block's values into the row of scales of the whole context."""
    source = slab + slab_bytes - 4 * block_tokens
    for lane in range(0, block_tokens, LANES):
        store_singles(scales, slot + lane, load_singles(source, lane))


@compiled
def _add_weighted(upper, lower, parts, slab, whole, sums):
    """Adds a block's values times the bytes of their weights to a head's sums, [2, whole].

    parts: groups of four tokens, whose weights are a word of `upper` and one of `lower`.
    """
    dim, others = 0, sums + 4 * whole
    # Four registers of dimensions at a time, so that weights are loaded once for all of them.
    while dim + 4 * LANES <= whole:
        a0, a1 = load_words(sums, dim), load_words(sums, dim + LANES)
        a2, a3 = load_words(sums, dim + 2 * LANES), load_words(sums, dim + 3 * LANES)
        b0, b1 = load_words(others, dim), load_words(others, dim + LANES)
        b2, b3 = load_words(others, dim + 2 * LANES), load_words(others, dim + 3 * LANES)
        at = dim
        for word in range(parts):
            high, low = spread_word(load_word(upper, word)), spread_word(load_word(lower, word))
            value = load_words(slab, at)
            a0, b0 = multiply_bytes(a0, high, value), multiply_bytes(b0, low, value)
            value = load_words(slab, at + LANES)
            a1, b1 = multiply_bytes(a1, high, value), multiply_bytes(b1, low, value)
            value = load_words(slab, at + 2 * LANES)
            a2, b2 = multiply_bytes(a2, high, value), multiply_bytes(b2, low, value)
            value = load_words(slab, at + 3 * LANES)
            a3, b3 = multiply_bytes(a3, high, value), multiply_bytes(b3, low, value)
            at += whole
        store_words(sums, dim, a0)
        store_words(sums, dim + LANES, a1)
        store_words(sums, dim + 2 * LANES, a2)
        store_words(sums, dim + 3 * LANES, a3)
        store_words(others, dim, b0)
        store_words(others, dim + LANES, b1)
        store_words(others, dim + 2 * LANES, b2)
        store_words(others, dim + 3 * LANES, b3)
        dim += 4 * LANES
    while dim < whole:
        a, b = load_words(sums, dim), load_words(others, dim)
        for word in range(parts):
            value = load_words(slab, word * whole + dim)
            a = multiply_bytes(a, spread_word(load_word(upper, word)), value)
            b = multiply_bytes(b, spread_word(load_word(lower, word)), value)
        store_words(sums, dim, a)
        store_words(others, dim, b)
        dim += LANES


@compiled
def _attend_one(attention, batch, qkv, out, row, first, last, scratch, room, following):
    """Attends with the heads first..last of one row over its context, block by block in memory order.

    While one block is computed the next is prefetched; otherwise the processor would wait for memory.
    scratch: `_scratch` bytes; room: slots of the longest context; following: the block that is read next.
    """
    head_dim, block_tokens, kv_heads = attention.head_dim, attention.block_tokens, attention.kv_heads
    keys, values = attention.keys, attention.values
    whole, count = _whole(head_dim), last - first
    table, length = block_table(batch, row), context_tokens(batch, row)
    blocks = (length + block_tokens - 1) // block_tokens
    slab_of_keys, slab_of_values = key_bytes(head_dim, block_tokens), value_bytes(head_dim, block_tokens)
    group = attention.heads // kv_heads
    first_kv_head = first // group
    # Parts of scratch, for each head: scores, scales, sums, the weights' bytes, the query and its factors.
    # Scales are those of KV heads, so they may need less.
    scores, scales = scratch, scratch + 4 * count * room
    sums = scales + 4 * count * room
    upper = sums + 8 * count * whole
    lower = upper + count * room
    queries = lower + count * room
    factors = queries + count * whole
    for head in range(count):
        query = (row * (attention.heads + 2 * kv_heads) + first + head) * head_dim
        _quantize_query(qkv, query, head_dim, queries + head * whole, factors + 16 * LANES * head)
    for index in range(blocks):
        block, slot = load_long(table, index) * kv_heads, index * block_tokens
        is_last = index + 1 == blocks
        following_block = load_long(table, 0 if is_last else index + 1) * kv_heads
        head, kv_head = 0, first_kv_head
        while head < count:
            slab = keys + (block + kv_head) * slab_of_keys
            if is_last:
                fetch_kept(values + (following_block + kv_head) * slab_of_values, 0, slab_of_values // 4)
            else:
                fetch_kept(keys + (following_block + kv_head) * slab_of_keys, 0, slab_of_keys // 4)
            _copy_scales(slab, slab_of_keys, block_tokens, scales, (kv_head - first_kv_head) * room + slot)
            kv_head += 1
            end = min(count, kv_head * group - first)
            while head < end:
                query, at, together = queries + head * whole, head * room + slot, 4 if head + 4 <= end else 1
                own = factors + 16 * LANES * head
                for lane in range(0, block_tokens, LANES):
                    if together == 4:
                        _store_scores_of_four(
                            query, whole, slab, lane, head_dim, block_tokens, own, scores, at + lane, room
                        )
                    else:
                        _store_scores(query, slab, lane, head_dim, block_tokens, own, scores, at + lane)
                head += together
    for head in range(count):
        factor = _weigh(
            scores + 4 * head * room,
            scales + 4 * ((first + head) // group - first_kv_head) * room,
            length,
            blocks * block_tokens,
            upper + head * room,
            lower + head * room,
        )
        store_single(factors, 4 * LANES * head, factor)
        for dim in range(0, 2 * whole, LANES):
            store_words(sums, head * 2 * whole + dim, no_words())
    for index in range(blocks):
        block = load_long(table, index) * kv_heads
        is_last = index + 1 == blocks
        following_block = (following if is_last else load_long(table, index + 1)) * kv_heads
        parts = _words(min(block_tokens, length - index * block_tokens))
        head, kv_head = 0, first_kv_head
        while head < count:
            if is_last:
                fetch_kept(keys + (following_block + kv_head) * slab_of_keys, 0, slab_of_keys // 4)
            else:
                fetch_kept(values + (following_block + kv_head) * slab_of_values, 0, slab_of_values // 4)
            slab = values + (block + kv_head) * slab_of_values
            kv_head += 1
            end = min(count, kv_head * group - first)
            while head < end:
                at, own = head * room + index * block_tokens, sums + 8 * head * whole
                _add_weighted(upper + at, lower + at, parts, slab, whole, own)
                head += 1
    for head in range(count):
        factor = load_single(factors, 4 * LANES * head)
        for dim in range(0, head_dim, LANES):
            place = head * 2 * whole + dim
            _store(
                load_words(sums, place),
                load_words(sums, place + whole),
                factor,
                out,
                (row * attention.heads + first + head) * head_dim + dim,
                head_dim - dim,
            )


@compiled
def _attend_four(attention, batch, qkv, out, row, head, scratch, room):
    """Attends with one head of four rows of one sequence, so that keys and values are read only once."""
    head_dim, block_tokens, kv_heads = attention.head_dim, attention.block_tokens, attention.kv_heads
    keys, values = attention.keys, attention.values
    width, qkv_width = attention.heads * head_dim, (attention.heads + 2 * kv_heads) * head_dim
    whole, kv_head = _whole(head_dim), head // (attention.heads // kv_heads)
    # The last row has the longest context. Tokens that the other rows do not see get weight zero.
    table, length = block_table(batch, row), context_tokens(batch, row + 3)
    blocks = (length + block_tokens - 1) // block_tokens
    slab_of_keys, slab_of_values = key_bytes(head_dim, block_tokens), value_bytes(head_dim, block_tokens)
    scores, scales = scratch, scratch + 16 * room
    upper = scales + 4 * room
    lower = upper + 4 * room
    queries = lower + 4 * room
    factors = queries + 4 * whole
    query = row * qkv_width + head * head_dim
    for index in range(4):
        at, own = query + index * qkv_width, factors + 16 * LANES * index
        _quantize_query(qkv, at, head_dim, queries + index * whole, own)
    for index in range(blocks):
        slab = keys + (load_long(table, index) * kv_heads + kv_head) * slab_of_keys
        for lane in range(0, block_tokens, LANES):
            at = index * block_tokens + lane
            _store_scores_of_four(
                queries, whole, slab, lane, head_dim, block_tokens, factors, scores, at, room
            )
        _copy_scales(slab, slab_of_keys, block_tokens, scales, index * block_tokens)
    for index in range(4):
        factor = _weigh(
            scores + 4 * index * room,
            scales,
            context_tokens(batch, row + index),
            blocks * block_tokens,
            upper + index * room,
            lower + index * room,
        )
        store_single(factors, index, factor)
    target = row * width + head * head_dim
    # Two registers of dimensions at a time: their sums use all registers.
    for dim in range(0, whole, 2 * LANES):
        a0, b0, c0, d0 = no_words(), no_words(), no_words(), no_words()
        e0, f0, g0, h0 = no_words(), no_words(), no_words(), no_words()
        a1, b1, c1, d1 = no_words(), no_words(), no_words(), no_words()
        e1, f1, g1, h1 = no_words(), no_words(), no_words(), no_words()
        for index in range(blocks):
            slab = values + (load_long(table, index) * kv_heads + kv_head) * slab_of_values
            high, low = upper + index * block_tokens, lower + index * block_tokens
            parts = _words(min(block_tokens, length - index * block_tokens))
            at = dim
            for word in range(parts):
                x, y = load_words(slab, at), load_words(slab, at + LANES)
                weight = spread_word(load_word(high, word))
                a0, a1 = multiply_bytes(a0, weight, x), multiply_bytes(a1, weight, y)
                weight = spread_word(load_word(low, word))
                b0, b1 = multiply_bytes(b0, weight, x), multiply_bytes(b1, weight, y)
                weight = spread_word(load_word(high + room, word))
                c0, c1 = multiply_bytes(c0, weight, x), multiply_bytes(c1, weight, y)
                weight = spread_word(load_word(low + room, word))
                d0, d1 = multiply_bytes(d0, weight, x), multiply_bytes(d1, weight, y)
                weight = spread_word(load_word(high + 2 * room, word))
                e0, e1 = multiply_bytes(e0, weight, x), multiply_bytes(e1, weight, y)
                weight = spread_word(load_word(low + 2 * room, word))
                f0, f1 = multiply_bytes(f0, weight, x), multiply_bytes(f1, weight, y)
                weight = spread_word(load_word(high + 3 * room, word))
                g0, g1 = multiply_bytes(g0, weight, x), multiply_bytes(g1, weight, y)
                weight = spread_word(load_word(low + 3 * room, word))
                h0, h1 = multiply_bytes(h0, weight, x), multiply_bytes(h1, weight, y)
                at += whole
        count, at = head_dim - dim, target + dim
        _store(a0, b0, load_single(factors, 0), out, at, count)
        _store(c0, d0, load_single(factors, 1), out, at + width, count)
        _store(e0, f0, load_single(factors, 2), out, at + 2 * width, count)
        _store(g0, h0, load_single(factors, 3), out, at + 3 * width, count)
        count, at = count - LANES, at + LANES
        if count > 0:
            _store(a1, b1, load_single(factors, 0), out, at, count)
            _store(c1, d1, load_single(factors, 1), out, at + width, count)
            _store(e1, f1, load_single(factors, 2), out, at + 2 * width, count)
            _store(g1, h1, load_single(factors, 3), out, at + 3 * width, count)


@compiled
def _scratch(count, head_dim, room):
    """Bytes of work space for `count` heads of one row, or for one head of `count` rows."""
    whole = _whole(head_dim)
    return count * (10 * room + 9 * whole + 16 * LANES)


@compiled
def attend_int8(thread, attention, batch, qkv, out):
    """Attends with a thread's share of the heads, for all rows. Arguments: as in `attention.attend`."""
    block_tokens = attention.block_tokens
    room = (longest_context(batch) + block_tokens - 1) // block_tokens * block_tokens
    first, last = share(thread, attention.heads)
    scratch = np.empty(_scratch(max(4, last - first), attention.head_dim, room), np.uint8)
    own, row = scratch.ctypes.data, 0
    while row < batch.rows:
        if are_of_one_sequence(batch, row, row + 3):
            place_queries(attention, batch, qkv, row, row + 4, first, last)
            for head in range(first, last):
                _attend_four(attention, batch, qkv, out, row, head, own, room)
            row += 4
        else:
            place_queries(attention, batch, qkv, row, row + 1, first, last)
            following = first_block_after(batch, row)
            _attend_one(attention, batch, qkv, out, row, first, last, own, room, following)
            row += 1
    keep(scratch)
