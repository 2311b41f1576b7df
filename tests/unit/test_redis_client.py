"""A command to Redis ends when it is cancelled, at any moment, and when Redis does not answer."""

import asyncio
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from helios import redis_client
from tests.stack import start_redis

# A command takes about seven turns of the event loop.
TURNS = 30


async def test_a_command_ends_whenever_its_cancellation_comes(redis_url: str) -> None:
    async with redis_client.connect(redis_url) as redis:
        await redis.ping()
        for turns in range(TURNS):
            command = asyncio.create_task(redis.ping())
            for _ in range(turns):
                await asyncio.sleep(0)
            if command.cancel():
                await asyncio.wait({command})
                assert command.cancelled(), f"the cancellation after {turns} turns of the loop was lost"


async def test_a_command_to_a_redis_that_hangs_ends_within_its_bound(tmp_path: Path) -> None:
    process, url = start_redis(tmp_path)
    try:
        async with redis_client.connect(url + "?socket_timeout=60", 0.2) as redis:
            await redis.ping()
            with process.frozen(), pytest.raises(RedisError, match=r"did not answer within 0\.2 s"):
                await redis.ping()
            assert await redis.ping()
    finally:
        process.kill()
