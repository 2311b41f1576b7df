"""Attention over paged KV in float32 or float16, for compiled steps.

Keys and values lie as `KVCache` says. A row's result is the same to the bit whatever rows are beside it:
each of its sums goes over its context in the order of the tokens.
"""

import numpy as np

from helios.engine.kernels.jit import compiled
from helios.engine.kernels.simd import (
    LANES,
    add,
    exponential,
    fetch_kept,
    keep,
    larger,
    largest,
    load_kept,
    load_long,
    load_single,
    load_singles,
    load_some,
    multiply,
    multiply_add,
    no_singles,
    spread_single,
    store_kept,
    store_single,
    store_singles,
    store_some,
    subtract,
    total,
)


@compiled
def longest_context(rows_of, rows):
    """Tokens that the row with most of them sees. rows_of: `Batch.addresses`."""
    longest = np.int64(0)
    for row in range(rows):
        longest = max(longest, load_long(rows_of[1], row) + 1)
    return longest


@compiled
def are_of_one_sequence(rows_of, row, last, rows):
    """Whether the rows from `row` to `last` are there, and of one sequence: its rows follow each other."""
    return last < rows and load_long(rows_of[3], row) == load_long(rows_of[3], last)


@compiled
def first_block_after(rows_of, row, rows):
    """The block that is read first for the row behind this one, or for the last one again."""
    beside = load_long(rows_of[3], min(row + 1, rows - 1))
    return load_long(rows_of[5] + 8 * beside * rows_of[6], 0)


@compiled
def _scores(qkv, query, keys, slab, head_dim, block_tokens):
    """A query with 16 keys of a block."""
    a, b, c, d = no_singles(), no_singles(), no_singles(), no_singles()
    for dim in range(0, head_dim, 4):
        at = slab + dim * block_tokens
        a = multiply_add(spread_single(load_single(qkv, query + dim)), load_kept(keys, at), a)
        at += block_tokens
        b = multiply_add(spread_single(load_single(qkv, query + dim + 1)), load_kept(keys, at), b)
        at += block_tokens
        c = multiply_add(spread_single(load_single(qkv, query + dim + 2)), load_kept(keys, at), c)
        at += block_tokens
        d = multiply_add(spread_single(load_single(qkv, query + dim + 3)), load_kept(keys, at), d)
    return add(add(a, b), add(c, d))


@compiled
def _scores_of_four(qkv, query, stride, keys, slab, head_dim, block_tokens):
    """Four queries with the same 16 keys, each as by `_scores`."""
    a0, b0, c0, d0 = no_singles(), no_singles(), no_singles(), no_singles()
    a1, b1, c1, d1 = no_singles(), no_singles(), no_singles(), no_singles()
    a2, b2, c2, d2 = no_singles(), no_singles(), no_singles(), no_singles()
    a3, b3, c3, d3 = no_singles(), no_singles(), no_singles(), no_singles()
    for dim in range(0, head_dim, 4):
        at = slab + dim * block_tokens
        a, b = load_kept(keys, at), load_kept(keys, at + block_tokens)
        c, d = load_kept(keys, at + 2 * block_tokens), load_kept(keys, at + 3 * block_tokens)
        at = query + dim
        a0 = multiply_add(spread_single(load_single(qkv, at)), a, a0)
        b0 = multiply_add(spread_single(load_single(qkv, at + 1)), b, b0)
        c0 = multiply_add(spread_single(load_single(qkv, at + 2)), c, c0)
        d0 = multiply_add(spread_single(load_single(qkv, at + 3)), d, d0)
        at += stride
        a1 = multiply_add(spread_single(load_single(qkv, at)), a, a1)
        b1 = multiply_add(spread_single(load_single(qkv, at + 1)), b, b1)
        c1 = multiply_add(spread_single(load_single(qkv, at + 2)), c, c1)
        d1 = multiply_add(spread_single(load_single(qkv, at + 3)), d, d1)
        at += stride
        a2 = multiply_add(spread_single(load_single(qkv, at)), a, a2)
        b2 = multiply_add(spread_single(load_single(qkv, at + 1)), b, b2)
        c2 = multiply_add(spread_single(load_single(qkv, at + 2)), c, c2)
        d2 = multiply_add(spread_single(load_single(qkv, at + 3)), d, d2)
        at += stride
        a3 = multiply_add(spread_single(load_single(qkv, at)), a, a3)
        b3 = multiply_add(spread_single(load_single(qkv, at + 1)), b, b3)
        c3 = multiply_add(spread_single(load_single(qkv, at + 2)), c, c3)
        d3 = multiply_add(spread_single(load_single(qkv, at + 3)), d, d3)
    return (
        add(add(a0, b0), add(c0, d0)), add(add(a1, b1), add(c1, d1)),
        add(add(a2, b2), add(c2, d2)), add(add(a3, b3), add(c3, d3)),
    )


@compiled
def _weigh(scores, length, padded):
    """A row's scores as the weights of its slots, in place."""
    for slot in range(length, padded):
        store_single(scores, slot, np.float32(-np.inf))
    peaks = load_singles(scores, 0)
    for slot in range(LANES, padded, LANES):
        peaks = larger(peaks, load_singles(scores, slot))
    peak = spread_single(largest(peaks))
    for slot in range(0, padded, LANES):
        store_singles(scores, slot, exponential(subtract(load_singles(scores, slot), peak)))
    # The smallest exponential is not zero, but a slot beyond the context weighs nothing at all.
    for slot in range(length, padded):
        store_single(scores, slot, np.float32(0))
    sums = no_singles()
    for slot in range(0, padded, LANES):
        sums = add(sums, load_singles(scores, slot))
    share = spread_single(np.float32(1) / total(sums))
    for slot in range(0, padded, LANES):
        store_singles(scores, slot, multiply(load_singles(scores, slot), share))


@compiled
def _add_weighted(weights, count, values, at, head_dim, out, target):
    """Adds to a head's output the values of `count` tokens, [tokens, head_dim], times their weights."""
    dim = 0
    while dim + 4 * LANES <= head_dim:
        a, b = load_singles(out, target + dim), load_singles(out, target + dim + LANES)
        c, d = load_singles(out, target + dim + 2 * LANES), load_singles(out, target + dim + 3 * LANES)
        place = at + dim
        for token in range(count):
            weight = spread_single(load_single(weights, token))
            a = multiply_add(weight, load_kept(values, place), a)
            b = multiply_add(weight, load_kept(values, place + LANES), b)
            c = multiply_add(weight, load_kept(values, place + 2 * LANES), c)
            d = multiply_add(weight, load_kept(values, place + 3 * LANES), d)
            place += head_dim
        store_singles(out, target + dim, a)
        store_singles(out, target + dim + LANES, b)
        store_singles(out, target + dim + 2 * LANES, c)
        store_singles(out, target + dim + 3 * LANES, d)
        dim += 4 * LANES
    while dim < head_dim:
        a = load_some(out, target + dim, head_dim - dim)
        for token in range(count):
            weight = spread_single(load_single(weights, token))
            # What lies beyond the head is read too, but goes nowhere.
            a = multiply_add(weight, load_kept(values, at + token * head_dim + dim), a)
        store_some(out, target + dim, head_dim - dim, a)
        dim += LANES


@compiled
def _attend_one(
    qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, row, first, last, scores, room, following
):
    """The heads first..last of one row over its context, block by block as they lie in memory.

    While one block is computed the next is fetched: memory would be waited for otherwise. scores: room for as
    many heads, `room` numbers each; following: the block that is read next.
    """
    width = heads * head_dim
    tables = rows_of[5] + 8 * load_long(rows_of[3], row) * rows_of[6]
    length = load_long(rows_of[1], row) + 1
    blocks = (length + block_tokens - 1) // block_tokens
    slab_size = head_dim * block_tokens
    factor = spread_single(np.float32(1) / np.sqrt(np.float32(head_dim)))
    query = row * 3 * width
    for index in range(blocks):
        block = load_long(tables, index) * heads
        is_last = index + 1 == blocks
        fetched, ahead = values if is_last else keys, load_long(tables, 0 if is_last else index + 1) * heads
        for head in range(first, last):
            slab = (block + head) * slab_size
            fetch_kept(fetched, (ahead + head) * slab_size, slab_size)
            at = (head - first) * room + index * block_tokens
            for lane in range(0, block_tokens, LANES):
                value = _scores(qkv, query + head * head_dim, keys, slab + lane, head_dim, block_tokens)
                store_singles(scores, at + lane, multiply(value, factor))
    for head in range(first, last):
        _weigh(scores + 4 * (head - first) * room, length, blocks * block_tokens)
    target = row * width
    for at in range(target + first * head_dim, target + last * head_dim):
        store_single(out, at, np.float32(0))
    for index in range(blocks):
        block = load_long(tables, index) * heads
        count = min(block_tokens, length - index * block_tokens)
        is_last = index + 1 == blocks
        ahead = (following if is_last else load_long(tables, index + 1)) * heads
        fetched = keys if is_last else values
        for head in range(first, last):
            fetch_kept(fetched, (ahead + head) * slab_size, slab_size)
            weights = scores + 4 * ((head - first) * room + index * block_tokens)
            at = (block + head) * slab_size
            _add_weighted(weights, count, values, at, head_dim, out, target + head * head_dim)


@compiled
def _attend_four(
    qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, row, head, scores, room
):
    """A head of four rows of one sequence, each as by `_attend_one`: keys and values are read once for all.

    scores: room for four rows', `room` numbers each.
    """
    width = heads * head_dim
    tables = rows_of[5] + 8 * load_long(rows_of[3], row) * rows_of[6]
    # The last one sees most. What the others do not see weighs nothing.
    length = load_long(rows_of[1], row + 3) + 1
    blocks = (length + block_tokens - 1) // block_tokens
    slab_size = head_dim * block_tokens
    factor = spread_single(np.float32(1) / np.sqrt(np.float32(head_dim)))
    query = row * 3 * width + head * head_dim
    for index in range(blocks):
        slab = (load_long(tables, index) * heads + head) * slab_size
        for lane in range(0, block_tokens, LANES):
            s0, s1, s2, s3 = _scores_of_four(
                qkv, query, 3 * width, keys, slab + lane, head_dim, block_tokens
            )
            at = index * block_tokens + lane
            store_singles(scores, at, multiply(s0, factor))
            store_singles(scores, at + room, multiply(s1, factor))
            store_singles(scores, at + 2 * room, multiply(s2, factor))
            store_singles(scores, at + 3 * room, multiply(s3, factor))
    for index in range(4):
        _weigh(scores + 4 * index * room, load_long(rows_of[1], row + index) + 1, blocks * block_tokens)
    target = row * width + head * head_dim
    # Two registers of dimensions at a time: sums of one alone wait for each other.
    for dim in range(0, head_dim, 2 * LANES):
        a0, b0, c0, d0 = no_singles(), no_singles(), no_singles(), no_singles()
        a1, b1, c1, d1 = no_singles(), no_singles(), no_singles(), no_singles()
        for index in range(blocks):
            at = (load_long(tables, index) * heads + head) * slab_size + dim
            slot = index * block_tokens
            for token in range(slot, min(slot + block_tokens, length)):
                x, y = load_kept(values, at), load_kept(values, at + LANES)
                weight = spread_single(load_single(scores, token))
                a0, a1 = multiply_add(weight, x, a0), multiply_add(weight, y, a1)
                weight = spread_single(load_single(scores, room + token))
                b0, b1 = multiply_add(weight, x, b0), multiply_add(weight, y, b1)
                weight = spread_single(load_single(scores, 2 * room + token))
                c0, c1 = multiply_add(weight, x, c0), multiply_add(weight, y, c1)
                weight = spread_single(load_single(scores, 3 * room + token))
                d0, d1 = multiply_add(weight, x, d0), multiply_add(weight, y, d1)
                at += head_dim
        for half in range(2):
            count, at = head_dim - dim - half * LANES, target + dim + half * LANES
            store_some(out, at, count, a1 if half else a0)
            store_some(out, at + width, count, b1 if half else b0)
            store_some(out, at + 2 * width, count, c1 if half else c0)
            store_some(out, at + 3 * width, count, d1 if half else d0)


@compiled
def attend(thread, threads, qkv, rows, heads, head_dim, keys, values, block_tokens, rows_of, out):
    """A thread's share of the heads, of all rows, over the rows' contexts. """
    room = longest_context(rows_of, rows) + block_tokens
    first, last = heads * thread // threads, heads * (thread + 1) // threads
    scores = np.empty(max(4, last - first) * room, np.float32)
    row = 0
    while row < rows:
        if are_of_one_sequence(rows_of, row, row + 3, rows):
            for head in range(first, last):
                _attend_four(
                    qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, row, head,
                    scores.ctypes.data, room,
                )
            row += 4
        else:
            following = first_block_after(rows_of, row, rows)
            _attend_one(
                qkv, heads, head_dim, keys, values, block_tokens, rows_of, out, row, first, last,
                scores.ctypes.data, room, following,
            )
            row += 1
    keep(scores)


@compiled
def remember(qkv, start, end, width, head_dim, keys, values, block_tokens, slots):
    """Stores keys and values of the rows start..end of qkv, float32 [rows, 3, width], at their slots."""
    for row in range(start, end):
        slot = load_long(slots, row)
        block, offset = slot // block_tokens * width * block_tokens, slot % block_tokens
        source = row * 3 * width + width
        for entry in range(0, width, LANES):
            key = load_some(qkv, source + entry, width - entry)
            store_kept(keys, block + entry * block_tokens + offset, block_tokens, width - entry, key)
        for head in range(width // head_dim):
            at, start = block + (head * block_tokens + offset) * head_dim, source + width + head * head_dim
            for dim in range(0, head_dim, LANES):
                value = load_some(qkv, start + dim, head_dim - dim)
                store_kept(values, at + dim, 1, head_dim - dim, value)
