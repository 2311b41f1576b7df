"""Attention over paged KV in float32 or float16.

`KVCache` describes the layout of keys and values. A row's result is bit-identical whatever other rows are in
the batch, because each of its sums follows the order of the tokens of its context.
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
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.rotation import place_key, place_queries
from helios.engine.kernels.simd import (
    LANES,
    add,
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
def _scores(qkv, query, keys, slab, head_dim, block_tokens):
    """The dot products of a query with 16 keys of a block."""
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
    """The dot products of four queries with the same 16 keys. Each is summed as in `_scores`."""
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
        add(add(a0, b0), add(c0, d0)),
        add(add(a1, b1), add(c1, d1)),
        add(add(a2, b2), add(c2, d2)),
        add(add(a3, b3), add(c3, d3)),
    )


@compiled
def _weigh(scores, length, padded):
    """Turns a row's scores into the softmax weights of its slots, in place."""
    for slot in range(length, padded):
        store_single(scores, slot, np.float32(-np.inf))
    peaks = load_singles(scores, 0)
    for slot in range(LANES, padded, LANES):
        peaks = larger(peaks, load_singles(scores, slot))
    peak = spread_single(largest(peaks))
    for slot in range(0, padded, LANES):
        store_singles(scores, slot, exponential(subtract(load_singles(scores, slot), peak)))
    # The smallest exponential is not zero, so slots beyond the context are set to zero here.
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
    """Adds the values of `count` tokens, [tokens, head_dim], times their weights to a head's output."""
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
            # The load also reads numbers beyond the head, but they are not stored.
            a = multiply_add(weight, load_kept(values, at + token * head_dim + dim), a)
        store_some(out, target + dim, head_dim - dim, a)
        dim += LANES


@compiled
def _attend_one(attention, batch, qkv, out, row, first, last, scores, room, following):
    """Attends with the heads first..last of one row over its context, block by block in memory order.

    While one block is computed the next is prefetched; otherwise the processor would wait for memory. scores:
    space for the scores of each head, `room` numbers each; following: the block that is read next.
    """
    head_dim, block_tokens, kv_heads = attention.head_dim, attention.block_tokens, attention.kv_heads
    keys, values = attention.keys, attention.values
    table, length = block_table(batch, row), context_tokens(batch, row)
    blocks = (length + block_tokens - 1) // block_tokens
    slab_size = head_dim * block_tokens
    factor = spread_single(np.float32(1) / np.sqrt(np.float32(head_dim)))
    query = row * (attention.heads + 2 * kv_heads) * head_dim
    group = attention.heads // kv_heads
    first_kv_head = first // group
    for index in range(blocks):
        block = load_long(table, index) * kv_heads
        is_last = index + 1 == blocks
        fetched = values if is_last else keys
        ahead = load_long(table, 0 if is_last else index + 1) * kv_heads
        head, kv_head = first, first_kv_head
        while head < last:
            slab = (block + kv_head) * slab_size
            fetch_kept(fetched, (ahead + kv_head) * slab_size, slab_size)
            kv_head += 1
            end = min(last, kv_head * group)
            while head < end:
                at, own = (head - first) * room + index * block_tokens, query + head * head_dim
                if head + 4 <= end:
                    for lane in range(0, block_tokens, LANES):
                        s0, s1, s2, s3 = _scores_of_four(
                            qkv, own, head_dim, keys, slab + lane, head_dim, block_tokens
                        )
                        store_singles(scores, at + lane, multiply(s0, factor))
                        store_singles(scores, at + room + lane, multiply(s1, factor))
                        store_singles(scores, at + 2 * room + lane, multiply(s2, factor))
                        store_singles(scores, at + 3 * room + lane, multiply(s3, factor))
                    head += 4
                else:
                    for lane in range(0, block_tokens, LANES):
                        value = _scores(qkv, own, keys, slab + lane, head_dim, block_tokens)
                        store_singles(scores, at + lane, multiply(value, factor))
                    head += 1
    for head in range(first, last):
        _weigh(scores + 4 * (head - first) * room, length, blocks * block_tokens)
    target = row * attention.heads * head_dim
    for at in range(target + first * head_dim, target + last * head_dim):
        store_single(out, at, np.float32(0))
    for index in range(blocks):
        block = load_long(table, index) * kv_heads
        count = min(block_tokens, length - index * block_tokens)
        is_last = index + 1 == blocks
        ahead = (following if is_last else load_long(table, index + 1)) * kv_heads
        fetched = keys if is_last else values
        head, kv_head = first, first_kv_head
        while head < last:
            at = (block + kv_head) * slab_size
            fetch_kept(fetched, (ahead + kv_head) * slab_size, slab_size)
            kv_head += 1
            end = min(last, kv_head * group)
            while head < end:
                weights = scores + 4 * ((head - first) * room + index * block_tokens)
                _add_weighted(weights, count, values, at, head_dim, out, target + head * head_dim)
                head += 1


@compiled
def _attend_four(attention, batch, qkv, out, row, head, scores, room):
    """Attends with one head of four rows of one sequence, so that keys and values are read once for all four.

    Each row is computed as in `_attend_one`. scores: space for four rows, `room` numbers each.
    """
    head_dim, block_tokens, kv_heads = attention.head_dim, attention.block_tokens, attention.kv_heads
    keys, values = attention.keys, attention.values
    width, qkv_width = attention.heads * head_dim, (attention.heads + 2 * kv_heads) * head_dim
    # The last row has the longest context. Tokens that the other rows do not see get weight zero.
    table, length = block_table(batch, row), context_tokens(batch, row + 3)
    blocks = (length + block_tokens - 1) // block_tokens
    slab_size, kv_head = head_dim * block_tokens, head // (attention.heads // kv_heads)
    factor = spread_single(np.float32(1) / np.sqrt(np.float32(head_dim)))
    query = row * qkv_width + head * head_dim
    for index in range(blocks):
        slab = (load_long(table, index) * kv_heads + kv_head) * slab_size
        for lane in range(0, block_tokens, LANES):
            s0, s1, s2, s3 = _scores_of_four(qkv, query, qkv_width, keys, slab + lane, head_dim, block_tokens)
            at = index * block_tokens + lane
            store_singles(scores, at, multiply(s0, factor))
            store_singles(scores, at + room, multiply(s1, factor))
            store_singles(scores, at + 2 * room, multiply(s2, factor))
            store_singles(scores, at + 3 * room, multiply(s3, factor))
    for index in range(4):
        _weigh(scores + 4 * index * room, context_tokens(batch, row + index), blocks * block_tokens)
    target = row * width + head * head_dim
    # Two registers of dimensions at a time, because sums in a single one would wait for each other.
    for dim in range(0, head_dim, 2 * LANES):
        a0, b0, c0, d0 = no_singles(), no_singles(), no_singles(), no_singles()
        a1, b1, c1, d1 = no_singles(), no_singles(), no_singles(), no_singles()
        for index in range(blocks):
            at = (load_long(table, index) * kv_heads + kv_head) * slab_size + dim
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
def attend_float(thread, attention, batch, qkv, out):
    """Attends with a thread's share of the heads, for all rows. Arguments: as in `attention.attend`."""
    room = longest_context(batch) + attention.block_tokens
    first, last = share(thread, attention.heads)
    scores = np.empty(max(4, last - first) * room, np.float32)
    own, row = scores.ctypes.data, 0
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
    keep(scores)


@compiled
def remember_float(thread, attention, rows, slots, positions, qkv):
    """Stores the keys and values of a thread's share of the rows. Arguments: as in `attention.remember`."""
    head_dim, block_tokens, kv_heads = attention.head_dim, attention.block_tokens, attention.kv_heads
    keys, values = attention.keys, attention.values
    queries, width = attention.heads * head_dim, kv_heads * head_dim
    start, end = share(thread, rows)
    for row in range(start, end):
        slot = load_long(slots, row)
        block, offset = slot // block_tokens * width * block_tokens, slot % block_tokens
        source = row * (queries + 2 * width) + queries
        for head in range(kv_heads):
            place_key(attention, load_long(positions, row), qkv + 4 * (source + head * head_dim))
        for entry in range(0, width, LANES):
            key = load_some(qkv, source + entry, width - entry)
            store_kept(keys, block + entry * block_tokens + offset, block_tokens, width - entry, key)
        for head in range(kv_heads):
            at, value_at = block + (head * block_tokens + offset) * head_dim, source + width + head * head_dim
            for dim in range(0, head_dim, LANES):
                value = load_some(qkv, value_at + dim, head_dim - dim)
                store_kept(values, at + dim, 1, head_dim - dim, value)
