"""Attention over paged KV in int8, for compiled steps: products of bytes, as those of the weights.

Keys and values lie as `KVCache` says, each token's in a head with a scale by which its largest number is
127. A query is rounded to bytes in the same way. The weights of a row's values, times the scales of these,
are rounded to 16 bits and multiplied as two bytes. All sums of products are whole numbers: a row's result is
the same to the bit whatever rows are beside it, and in whatever order they are summed.
"""

import numpy as np

from helios.engine.kernels.attention_float import are_of_one_sequence, first_block_after, longest_context
from helios.engine.kernels.inner_product import multiply_bytes
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.simd import (
    LANES,
    absolute,
    add,
    add_words,
    both_of,
    either_of,
    exponential,
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
    subtract_words,
    to_singles,
    to_words,
    total,
    total_words,
)

# Numbers of a word, which a product takes at once.
_TOGETHER = 4
# What a key's zero is: products take one side unsigned.
_MIDDLE = 128
# The largest weight, in two bytes. Sums of 32 bits hold the products of contexts up to 66,000 tokens.
_MOST = 65535
# A group's smallest largest value that is not taken for zero: its inverse is still a number.
LEAST = 1e-30


@compiled
def key_bytes(head_dim, block_tokens):
    """Of a head's keys in a block, [head_dim / 4, tokens, 4], and of the scales, [2, tokens]."""
    return (head_dim + _TOGETHER - 1) // _TOGETHER * block_tokens * _TOGETHER + 8 * block_tokens


@compiled
def value_bytes(head_dim, block_tokens):
    """Of a head's values in a block: [tokens / 4, head_dim in whole registers, 4]."""
    words = (block_tokens + _TOGETHER - 1) // _TOGETHER
    return words * _whole(head_dim) * _TOGETHER


@compiled
def _whole(head_dim):
    return (head_dim + LANES - 1) // LANES * LANES


@compiled
def _peak(numbers, at, count):
    """The largest absolute value of `count` float32."""
    whole = count - count % LANES
    peaks = no_singles()
    if whole < count:
        peaks = absolute(load_some(numbers, at + whole, count - whole))
    for entry in range(0, whole, LANES):
        peaks = larger(peaks, absolute(load_singles(numbers, at + entry)))
    return largest(peaks)


@compiled
def _inverse(peak, most):
    """What numbers up to `peak` are multiplied by so that they become whole ones up to `most`."""
    return np.float32(most) / peak if peak > np.float32(LEAST) else np.float32(0)


@compiled
def _load(numbers, at, count):
    """16 of `count` float32 or, if they are fewer, these and zeros."""
    return load_singles(numbers, at) if count >= LANES else load_some(numbers, at, count)


@compiled
def remember(thread, threads, qkv, rows, heads, head_dim, keys, values, block_tokens, slots):
    """Stores keys and values of qkv, float32 [rows, 3, heads, head_dim], at their slots: a thread's heads.

    Not its rows: tokens side by side share words.
    """
    width, whole = heads * head_dim, _whole(head_dim)
    first, last = heads * thread // threads, heads * (thread + 1) // threads
    slab_of_keys, slab_of_values = key_bytes(head_dim, block_tokens), value_bytes(head_dim, block_tokens)
    room = np.empty(LANES // _TOGETHER, np.int32)
    own = room.ctypes.data
    middle, byte = spread_single(np.float32(_MIDDLE)), spread_word(np.int32(255))
    for row in range(rows):
        slot = load_long(slots, row)
        block, token = slot // block_tokens * heads, slot % block_tokens
        # The token's byte in a word, and the bytes of others.
        word, shift = token // _TOGETHER * whole, spread_word(np.int32(8 * (token % _TOGETHER)))
        others = spread_word(np.int32(~(255 << (8 * (token % _TOGETHER)))))
        for head in range(first, last):
            key = row * 3 * width + width + head * head_dim
            slab = keys + (block + head) * slab_of_keys
            scales = slab + slab_of_keys - 8 * block_tokens
            peak = _peak(qkv, key, head_dim)
            store_single(scales, token, peak / np.float32(127))
            factor = spread_single(_inverse(peak, 127))
            for dim in range(0, head_dim, LANES):
                count = head_dim - dim
                value = round_to_even(multiply(_load(qkv, key + dim, count), factor))
                store_bytes(own, 0, add(value, middle))
                at = dim // _TOGETHER * block_tokens + token
                for part in range((min(LANES, count) + _TOGETHER - 1) // _TOGETHER):
                    store_word(slab, at + part * block_tokens, load_word(own, part))
            value_at = key + width
            slab = values + (block + head) * slab_of_values
            peak = _peak(qkv, value_at, head_dim)
            store_single(scales, block_tokens + token, peak / np.float32(127))
            factor = spread_single(_inverse(peak, 127))
            for dim in range(0, head_dim, LANES):
                value = multiply(_load(qkv, value_at + dim, head_dim - dim), factor)
                added = shift_left(both_of(to_words(round_to_even(value)), byte), shift)
                kept = both_of(load_words(slab, word + dim), others)
                store_words(slab, word + dim, either_of(kept, added))
    keep(room)


@compiled
def _quantize_query(qkv, query, head_dim, out):
    """A head's query as bytes at out; returns what a step of them is, and their sum times the keys' zero."""
    peak = _peak(qkv, query, head_dim)
    factor = spread_single(_inverse(peak, 127))
    sums = no_words()
    for dim in range(0, head_dim, LANES):
        value = to_words(round_to_even(multiply(_load(qkv, query + dim, head_dim - dim), factor)))
        store_low_bytes(out, dim, value)
        sums = add_words(sums, value)
    return peak / np.float32(127), spread_word(np.int32(_MIDDLE * total_words(sums)))


@compiled
def _scores(query, slab, lane, words, block_tokens):
    """A query with 16 keys of a block."""
    a, b, at = no_words(), no_words(), lane
    for word in range(0, words - 1, 2):
        a = multiply_bytes(a, load_words(slab, at), spread_word(load_word(query, word)))
        at += block_tokens
        b = multiply_bytes(b, load_words(slab, at), spread_word(load_word(query, word + 1)))
        at += block_tokens
    if words % 2:
        a = multiply_bytes(a, load_words(slab, at), spread_word(load_word(query, words - 1)))
    return add_words(a, b)


@compiled
def _scores_of_four(query, stride, slab, lane, words, block_tokens):
    """Four queries, `stride` bytes apart, with the same 16 keys."""
    a0, b0, c0, d0 = no_words(), no_words(), no_words(), no_words()
    a1, b1, c1, d1 = no_words(), no_words(), no_words(), no_words()
    second, third, fourth, at = query + stride, query + 2 * stride, query + 3 * stride, lane
    for word in range(0, words - 1, 2):
        keys = load_words(slab, at)
        a0 = multiply_bytes(a0, keys, spread_word(load_word(query, word)))
        b0 = multiply_bytes(b0, keys, spread_word(load_word(second, word)))
        c0 = multiply_bytes(c0, keys, spread_word(load_word(third, word)))
        d0 = multiply_bytes(d0, keys, spread_word(load_word(fourth, word)))
        keys = load_words(slab, at + block_tokens)
        a1 = multiply_bytes(a1, keys, spread_word(load_word(query, word + 1)))
        b1 = multiply_bytes(b1, keys, spread_word(load_word(second, word + 1)))
        c1 = multiply_bytes(c1, keys, spread_word(load_word(third, word + 1)))
        d1 = multiply_bytes(d1, keys, spread_word(load_word(fourth, word + 1)))
        at += 2 * block_tokens
    if words % 2:
        keys, word = load_words(slab, at), words - 1
        a0 = multiply_bytes(a0, keys, spread_word(load_word(query, word)))
        b0 = multiply_bytes(b0, keys, spread_word(load_word(second, word)))
        c0 = multiply_bytes(c0, keys, spread_word(load_word(third, word)))
        d0 = multiply_bytes(d0, keys, spread_word(load_word(fourth, word)))
    return add_words(a0, a1), add_words(b0, b1), add_words(c0, c1), add_words(d0, d1)


@compiled
def _weigh(scores, scales, length, padded, upper, lower):
    """A row's scores as the weights of its slots, times the values' scales, in two bytes each.

    Returns what a step of the lower bytes is.
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
            # The smallest exponential is not zero, but a slot beyond the context weighs nothing at all.
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
    """Sums of products with both bytes of the weights become float32."""
    value = multiply_add(to_singles(upper), spread_single(np.float32(256)), to_singles(lower))
    store_some(out, at, count, multiply(value, spread_single(factor)))


@compiled
def _copy_scales(slab, slab_bytes, block_tokens, scales, slot):
    """Those of a block's values to a row of all of the context."""
    source = slab + slab_bytes - 4 * block_tokens
    for lane in range(0, block_tokens, LANES):
        store_singles(scales, slot + lane, load_singles(source, lane))


@compiled
def _attend_one(
    qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, row, first, last, scratch, room, following
):
    """The heads first..last of one row over its context, block by block as they lie in memory.

    While one block is computed the next is fetched: memory would be waited for otherwise. scratch: as many
    bytes as `_scratch` says; room: slots of the longest context; following: the block that is read next.
    """
    width, whole, count = heads * head_dim, _whole(head_dim), last - first
    tables = rows_of[5] + 8 * load_long(rows_of[3], row) * rows_of[6]
    length = load_long(rows_of[1], row) + 1
    blocks = (length + block_tokens - 1) // block_tokens
    slab_of_keys, slab_of_values = key_bytes(head_dim, block_tokens), value_bytes(head_dim, block_tokens)
    words = (head_dim + _TOGETHER - 1) // _TOGETHER
    # Of each head: scores, scales, sums, the weights' bytes, the query, and its factor and sum.
    scores, scales = scratch, scratch + 4 * count * room
    sums = scales + 4 * count * room
    upper = sums + 8 * count * whole
    lower = upper + count * room
    queries = lower + count * room
    factors = queries + count * whole
    root = np.float32(1) / np.sqrt(np.float32(head_dim))
    for head in range(count):
        query = row * 3 * width + (first + head) * head_dim
        step, added = _quantize_query(qkv, query, head_dim, queries + head * whole)
        store_single(factors, head * 2 * LANES, step * root)
        store_words(factors, head * 2 * LANES + LANES, added)
    for index in range(blocks):
        block, slot = load_long(tables, index) * heads, index * block_tokens
        is_last = index + 1 == blocks
        following_block = load_long(tables, 0 if is_last else index + 1) * heads
        for head in range(count):
            slab = keys + (block + first + head) * slab_of_keys
            if is_last:
                fetch_kept(values + (following_block + first + head) * slab_of_values, 0, slab_of_values // 4)
            else:
                fetch_kept(keys + (following_block + first + head) * slab_of_keys, 0, slab_of_keys // 4)
            factor = spread_single(load_single(factors, head * 2 * LANES))
            added = load_words(factors, head * 2 * LANES + LANES)
            for lane in range(0, block_tokens, LANES):
                dots = _scores(queries + head * whole, slab, lane, words, block_tokens)
                own = load_singles(slab, words * block_tokens + lane)
                value = multiply(to_singles(subtract_words(dots, added)), multiply(own, factor))
                store_singles(scores, head * room + slot + lane, value)
            _copy_scales(slab, slab_of_keys, block_tokens, scales, head * room + slot)
    for head in range(count):
        factor = _weigh(
            scores + 4 * head * room, scales + 4 * head * room, length, blocks * block_tokens,
            upper + head * room, lower + head * room,
        )
        store_single(factors, head * 2 * LANES, factor)
        for dim in range(0, 2 * whole, LANES):
            store_words(sums, head * 2 * whole + dim, no_words())
    for index in range(blocks):
        block = load_long(tables, index) * heads
        is_last = index + 1 == blocks
        following_block = (following if is_last else load_long(tables, index + 1)) * heads
        parts = (min(block_tokens, length - index * block_tokens) + _TOGETHER - 1) // _TOGETHER
        for head in range(count):
            if is_last:
                fetch_kept(keys + (following_block + first + head) * slab_of_keys, 0, slab_of_keys // 4)
            else:
                fetch_kept(values + (following_block + first + head) * slab_of_values, 0, slab_of_values // 4)
            slab = values + (block + first + head) * slab_of_values
            at = head * room + index * block_tokens
            for dim in range(0, whole, LANES):
                place = head * 2 * whole + dim
                a, b = load_words(sums, place), load_words(sums, place + whole)
                for word in range(parts):
                    value = load_words(slab, word * whole + dim)
                    a = multiply_bytes(a, spread_word(load_word(upper + at, word)), value)
                    b = multiply_bytes(b, spread_word(load_word(lower + at, word)), value)
                store_words(sums, place, a)
                store_words(sums, place + whole, b)
    for head in range(count):
        factor = load_single(factors, head * 2 * LANES)
        for dim in range(0, head_dim, LANES):
            place = head * 2 * whole + dim
            _store(
                load_words(sums, place), load_words(sums, place + whole), factor, out,
                row * width + (first + head) * head_dim + dim, head_dim - dim,
            )


@compiled
def _attend_four(
    qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, row, head, scratch, room
):
    """A head of four rows of one sequence: keys and values are read once for all."""
    width, whole = heads * head_dim, _whole(head_dim)
    tables = rows_of[5] + 8 * load_long(rows_of[3], row) * rows_of[6]
    # The last one sees most. What the others do not see weighs nothing.
    length = load_long(rows_of[1], row + 3) + 1
    blocks = (length + block_tokens - 1) // block_tokens
    slab_of_keys, slab_of_values = key_bytes(head_dim, block_tokens), value_bytes(head_dim, block_tokens)
    words = (head_dim + _TOGETHER - 1) // _TOGETHER
    scores, scales = scratch, scratch + 16 * room
    upper = scales + 4 * room
    lower = upper + 4 * room
    queries = lower + 4 * room
    factors = queries + 4 * whole
    root = np.float32(1) / np.sqrt(np.float32(head_dim))
    query = row * 3 * width + head * head_dim
    s0, t0 = _quantize_query(qkv, query, head_dim, queries)
    s1, t1 = _quantize_query(qkv, query + 3 * width, head_dim, queries + whole)
    s2, t2 = _quantize_query(qkv, query + 6 * width, head_dim, queries + 2 * whole)
    s3, t3 = _quantize_query(qkv, query + 9 * width, head_dim, queries + 3 * whole)
    f0, f1 = spread_single(s0 * root), spread_single(s1 * root)
    f2, f3 = spread_single(s2 * root), spread_single(s3 * root)
    for index in range(blocks):
        slab = keys + (load_long(tables, index) * heads + head) * slab_of_keys
        for lane in range(0, block_tokens, LANES):
            d0, d1, d2, d3 = _scores_of_four(queries, whole, slab, lane, words, block_tokens)
            own, at = load_singles(slab, words * block_tokens + lane), index * block_tokens + lane
            store_singles(scores, at, multiply(to_singles(subtract_words(d0, t0)), multiply(own, f0)))
            at += room
            store_singles(scores, at, multiply(to_singles(subtract_words(d1, t1)), multiply(own, f1)))
            at += room
            store_singles(scores, at, multiply(to_singles(subtract_words(d2, t2)), multiply(own, f2)))
            at += room
            store_singles(scores, at, multiply(to_singles(subtract_words(d3, t3)), multiply(own, f3)))
        _copy_scales(slab, slab_of_keys, block_tokens, scales, index * block_tokens)
    for index in range(4):
        factor = _weigh(
            scores + 4 * index * room, scales, load_long(rows_of[1], row + index) + 1, blocks * block_tokens,
            upper + index * room, lower + index * room,
        )
        store_single(factors, index, factor)
    target = row * width + head * head_dim
    # Two registers of dimensions at a time: as many sums as there are registers for.
    for dim in range(0, whole, 2 * LANES):
        a0, b0, c0, d0 = no_words(), no_words(), no_words(), no_words()
        e0, f0, g0, h0 = no_words(), no_words(), no_words(), no_words()
        a1, b1, c1, d1 = no_words(), no_words(), no_words(), no_words()
        e1, f1, g1, h1 = no_words(), no_words(), no_words(), no_words()
        for index in range(blocks):
            slab = values + (load_long(tables, index) * heads + head) * slab_of_values
            high, low = upper + index * block_tokens, lower + index * block_tokens
            parts = (min(block_tokens, length - index * block_tokens) + _TOGETHER - 1) // _TOGETHER
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
    """Bytes that rows work on: of `count` heads, or of a head of as many rows."""
    whole = _whole(head_dim)
    return count * (10 * room + 9 * whole + 8 * LANES)


@compiled
def attend(thread, threads, qkv, rows, heads, head_dim, keys, values, block_tokens, rows_of, out):
    """A thread's heads (as of `remember`), of all rows, over the rows' contexts."""
    longest = longest_context(rows_of, rows)
    room = (longest + block_tokens - 1) // block_tokens * block_tokens
    first, last = heads * thread // threads, heads * (thread + 1) // threads
    scratch = np.empty(_scratch(max(4, last - first), head_dim, room), np.uint8)
    own = scratch.ctypes.data
    row = 0
    while row < rows:
        if are_of_one_sequence(rows_of, row, row + 3, rows):
            for head in range(first, last):
                _attend_four(
                    qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, row, head, own, room
                )
            row += 4
        else:
            following = first_block_after(rows_of, row, rows)
            _attend_one(
                qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, row, first, last, own, room,
                following,
            )
            row += 1
    keep(scratch)
