"""Freed blocks keep their content while there is room, and sequences that begin alike share them."""

import pytest

from helios.engine.scheduling.block_pool import BlockPool
from helios.errors import OutOfMemoryError


def published(pool: BlockPool, *digests: bytes) -> list[int]:
    blocks = pool.allocate(len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    return blocks


def test_the_longest_beginning_is_found() -> None:
    pool = BlockPool(8, 4)
    first, second, _ = published(pool, b"a", b"ab", b"abc")
    assert pool.reuse([b"a", b"ab", b"abx", b"abc"]) == [first, second]
    assert pool.reuse([b"b", b"ab"]) == []


def test_a_shared_block_is_free_when_its_last_holder_has_gone() -> None:
    pool = BlockPool(2, 4)
    blocks = published(pool, b"a")
    assert pool.reuse([b"a"]) == blocks
    pool.free(blocks)
    assert pool.free_blocks == 1
    pool.free(blocks)
    assert pool.free_blocks == 2
    with pytest.raises(ValueError, match="not held"):
        pool.free(blocks)


def test_content_stays_until_its_place_is_needed_and_the_oldest_end_goes_first() -> None:
    pool = BlockPool(4, 4)
    old = published(pool, b"a", b"ab")
    new = published(pool, b"x")
    pool.free(old)
    pool.free(new)
    pool.allocate(1)
    assert pool.reuse([b"a", b"ab"]) == old, "an empty block is taken first"
    pool.free(old)
    pool.allocate(1)
    assert pool.reuse([b"x"]) == [], "then the one that was freed longest ago"
    pool.allocate(1)
    assert pool.reuse([b"a", b"ab"]) == old[:1], "of a text its end"
    with pytest.raises(OutOfMemoryError, match="1 KV blocks asked, 0 of 4 free"):
        pool.allocate(1)


def test_the_first_of_two_equal_blocks_is_the_one_that_is_found() -> None:
    pool = BlockPool(4, 4)
    first = published(pool, b"a")
    second = published(pool, b"a")
    assert pool.reuse([b"a"]) == first
    pool.free(second)
    pool.free(first)
    pool.free(first)
    assert pool.reuse([b"a"]) == first
    assert pool.free_blocks == 3


def test_new_blocks_are_added_to_those_there_are() -> None:
    pool = BlockPool(2, 4)
    held = published(pool, b"a")
    pool.resize([5])
    assert sorted([*held, *pool.allocate(4)]) == [0, 1, 2, 3, 4]
    assert pool.reuse([b"a"]) == held


def test_a_renewed_pool_keeps_what_is_held_and_forgets_what_was_published() -> None:
    pool = BlockPool(8, 4)
    kept = published(pool, b"a")
    held = pool.allocate(2)
    pool.free(kept)
    pool.forget()
    pool.resize([4])
    assert pool.reuse([b"a"]) == []
    assert pool.free_blocks == 2
    assert sorted([*pool.allocate(2), *held]) == [0, 1, 2, 3]
    pool.free(held)
    pool.forget()
    pool.resize([6])
    assert pool.free_blocks == 4


def test_deep_blocks_are_the_last_that_shallow_sequences_take() -> None:
    pool = BlockPool(6, 4)
    # Two blocks have four layers, two have two, two have one.
    pool.resize([6, 4, 2, 2])
    assert [pool.free_for(depth) for depth in (1, 2, 3, 4)] == [6, 4, 2, 2]
    assert pool.allocate(3, depth=1) == [4, 5, 2]
    assert pool.allocate(2, depth=2) == [3, 0]
    with pytest.raises(OutOfMemoryError, match="2 KV blocks asked, 1 of 2 free"):
        pool.allocate(2, depth=3)
    assert pool.allocate(1, depth=4) == [1]
    pool.free([4, 5, 2, 3, 0, 1])
    assert [pool.free_for(depth) for depth in (1, 2, 3, 4)] == [6, 4, 2, 2]


def test_what_few_layers_hold_is_no_prefix_for_more_layers() -> None:
    pool = BlockPool(8, 4)
    shallow, deep, late = pool.allocate(3)
    pool.publish(shallow, b"a", 2)
    assert pool.reuse([b"a"], 3) == []
    assert pool.reuse([b"a"], 2) == [shallow]
    pool.publish(deep, b"a", 4)
    pool.publish(late, b"a", 3)
    assert pool.reuse([b"a"], 4) == pool.reuse([b"a"], 1) == [deep]
    for block in (shallow, shallow, deep, deep, deep, late):
        pool.free([block])
    assert pool.free_blocks == 8
    assert pool.reuse([b"a"], 4) == [deep]


def test_a_block_that_loses_layers_stays_a_prefix_for_those_it_keeps() -> None:
    pool = BlockPool(4, 4)
    pool.resize([4, 4, 4])
    first, second = pool.allocate(2, 3)
    pool.publish(first, b"a", 3)
    pool.publish(second, b"ab", 3)
    pool.free([first, second])
    pool.resize([4, 4, 1])
    assert pool.reuse([b"a", b"ab"], 3) == [first]
    pool.free([first])
    assert pool.reuse([b"a", b"ab"], 2) == [first, second]
    pool.free([first, second])
    # The third layer went, and came back without content.
    pool.resize([4, 4])
    pool.resize([4, 4, 4])
    assert pool.reuse([b"a"], 3) == []
    pool.resize([1, 1, 1])
    assert pool.reuse([b"a", b"ab"], 2) == [first]
    pool.free([first])
    assert pool.free_blocks == 1
