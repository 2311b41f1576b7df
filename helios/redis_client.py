"""The connection to Redis: every command ends within a bound, and at once when it is cancelled."""

import asyncio
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import TimeoutError as RedisTimeoutError


class _BoundedRedis(Redis):
    """Bounds commands itself, because redis-py loses cancellations when it does.

    With a `socket_timeout` redis-py sends in `asyncio.wait_for`. Before Python 3.12 that loses a cancellation
    which comes just as the sending ends (python/cpython#86296): the cancelled task runs on, and a service
    that waits for it never stops. This bound is for a command as a whole; redis-py's is for each of its ten
    retries.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        pool = ConnectionPool.from_url(url, socket_connect_timeout=timeout_seconds)
        # Also overrides a timeout in the URL.
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
    """A client of the Redis at `url`; it connects with its first command.

    A command raises redis.RedisError when Redis cannot be reached or has not answered in `timeout_seconds`.
    Pipelines have no bound; use a script instead, which is one command.
    """
    return _BoundedRedis(url, timeout_seconds)
