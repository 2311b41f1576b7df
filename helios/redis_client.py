"""The connection to Redis. Every command ends within a time limit, and at once when it is cancelled."""

import asyncio
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import TimeoutError as RedisTimeoutError


class _BoundedRedis(Redis):
    """Limits the time of commands itself, because redis-py loses cancellations when it does so.

    With a `socket_timeout` redis-py sends inside `asyncio.wait_for`. Before Python 3.12 this loses a
    cancellation that arrives just as sending ends (python/cpython#86296). The cancelled task then continues,
    and a service that waits for it never stops. This limit applies to a command as a whole; redis-py's limit
    would apply to each of its ten retries.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        pool = ConnectionPool.from_url(url, socket_connect_timeout=timeout_seconds)
        # Also overrides a timeout given in the URL.
        pool.connection_kwargs["socket_timeout"] = None
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._timeout_seconds = timeout_seconds

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except TimeoutError:
            raise RedisTimeoutError(f"Redis did not answer within {self._timeout_seconds:g} s") from None


def connect(url: str, timeout_seconds: float = 5.0) -> Redis:
    """A client of the Redis at `url`. It connects with its first command.

    A command raises redis.RedisError when Redis cannot be reached or has not answered within
    `timeout_seconds`. Pipelines have no limit. Use a script instead, which is one command.
    """
    return _BoundedRedis(url, timeout_seconds)
