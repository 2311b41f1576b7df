"""What routers learn from, in a real Redis."""

import asyncio
import json
import logging

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from helios import examples
from helios.redis_schema import EXAMPLES_PREFIX
from helios.routing.example import ModelExample


def numbered(*numbers: int, nats: float = 2.5) -> list[ModelExample]:
    return [
        ModelExample(
            id=str(number),
            ids=(2, number, number + 1),
            first_tokens=1,
            first_nats=nats,
            rest_nats=(nats, nats - 0.5),
            token_nats=(nats, nats),
        )
        for number in numbers
    ]


async def test_examples_come_back_in_order_by_model(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await examples.append(redis, "a", numbered(1, 2), 10)
        await examples.append(redis, "a", numbered(3), 10)
        await examples.append(redis, "a", [], 10)
        await examples.append(redis, "b", numbered(4), 10)
        assert await examples.read(redis, ["a", "b", "nobody"]) == {
            "a": numbered(1, 2, 3),
            "b": numbered(4),
            "nobody": [],
        }


async def test_only_the_newest_are_kept(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await examples.append(redis, "a", numbered(*range(4)), 5)
        await examples.append(redis, "a", numbered(*range(4, 7)), 5)
        assert await examples.read(redis, ["a"]) == {"a": numbered(*range(2, 7))}
        await examples.append(redis, "a", numbered(*range(10, 20)), 5)
        assert await examples.read(redis, ["a"]) == {"a": numbered(*range(15, 20))}


async def test_a_prompt_that_is_evaluated_again_pushes_out_no_other(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await examples.append(redis, "a", numbered(1, 2, 3), 3)
        for _ in range(4):
            await examples.append(redis, "a", numbered(1), 3)
        assert await examples.read(redis, ["a"]) == {"a": numbered(2, 3, 1)}


async def test_the_newest_example_of_a_prompt_counts(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await examples.append(redis, "a", numbered(1, 2), 9)
        await examples.append(redis, "a", numbered(1, nats=3.5), 9)
        assert await examples.read(redis, ["a"]) == {"a": [*numbered(2), *numbered(1, nats=3.5)]}


async def test_several_may_append_at_once(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        batches = [numbered(number, number + 1) for number in range(0, 40, 2)]
        await asyncio.gather(*(examples.append(redis, "a", batch, 30) for batch in batches))
        found = (await examples.read(redis, ["a"]))["a"]
        # Each batch is there as a whole or not at all.
        assert len(found) == 30
        numbers = [int(one.id) for one in found]
        assert all(second == first + 1 for first, second in zip(numbers[::2], numbers[1::2], strict=True))


async def test_broken_entries_are_ignored_and_said_once(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = EXAMPLES_PREFIX + "a"
    (whole,) = (one.model_dump(mode="json") for one in numbered(1))
    broken = [
        "not json",
        "[" * 100_000,
        json.dumps({"of": "another shape"}),
        json.dumps({**whole, "token_nats": [1.0]}),
        json.dumps({**whole, "first_tokens": 3}),
        json.dumps({**whole, "first_nats": float("nan")}),
    ]
    async with Redis.from_url(redis_url) as redis:
        await redis.rpush(key, *broken, json.dumps({**whole, "weather": "fine"}))
        await examples.append(redis, "a", numbered(2), 20)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert await examples.read(redis, ["a"]) == {"a": numbered(1, 2)}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) >= 4
    assert all(f"an entry of {key} is ignored: not an example of this version" in one for one in said)


async def test_a_key_that_holds_something_else_hides_only_its_own_model(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.set(EXAMPLES_PREFIX + "other", "text")
        await examples.append(redis, "a", numbered(1), 5)
        assert await examples.read(redis, ["other", "a"]) == {"other": [], "a": numbered(1)}
        assert "examples:other is ignored: it cannot be read" in caplog.text
        with pytest.raises(RedisError, match="WRONGTYPE"):
            await examples.append(redis, "other", numbered(1), 5)
