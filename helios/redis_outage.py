"""Work in Redis outside the data path. It is retried and reported while Redis is down or refuses it."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from helios.redis_schema import PROBE_PREFIX, WORKER_PREFIX

# Meaning of a server's error message and what to do, by a part of the message in lower case. Errors of
# scripts contain the same parts.
_REFUSALS = {
    "read only replica": "it is a read-only replica; name the primary's URL",
    "used memory > 'maxmemory'": "its memory is full; raise its maxmemory",
    "no permissions": "its user lacks a right; Helios needs the commands +@read +@write +@scripting "
    "+@connection +time on the keys ~helios:*",
    "persist": "it cannot save to its disk; make room there, or turn stop-writes-on-bgsave-error off",
    "not enough good replicas": "too few of its replicas answer; start them, or lower min-replicas-to-write",
    "moved": "it is part of a cluster, which Helios cannot use; name a single server",
}
_PROBE_MILLISECONDS = 10_000


def reason(error: Exception) -> str:
    """Why something in Redis failed, in words that say what to do."""
    if isinstance(error, AuthenticationError):
        return f"Redis does not let this user in ({error}); check user and password in its URL"
    if not isinstance(error, RedisError | OSError):
        return str(error)
    if not isinstance(error, ResponseError):
        return f"Redis cannot be reached: {error}"
    # A pipeline's error begins with the command, which may contain a user's prompt.
    said = str(error).rpartition(" of pipeline caused error: ")[2]
    for part, meaning in _REFUSALS.items():
        if part in said.lower():
            return f"Redis refuses it, because {meaning}"
    return f"Redis refuses it: {said}"


async def probe(redis: Redis) -> None:
    """Does everything that a stack needs from Redis: writes, reads and deletes a key, and lists leases.

    Raises redis.RedisError when Redis cannot be reached or refuses one of these.
    """
    key = PROBE_PREFIX + uuid.uuid4().hex
    await redis.set(key, "1", px=_PROBE_MILLISECONDS)
    await redis.mget([key])
    await redis.delete(key)
    await redis.scan(match=WORKER_PREFIX + "*", count=1)


class RedisOutage:
    """Tracks whether one repeated task fails in Redis. Logs each kind of failure once, and its end."""

    def __init__(self, log: logging.Logger, lost: str, back: str) -> None:
        self._log = log
        self._lost = lost
        self._back = back
        self._said: set[type[Exception]] = set()
        # What Redis refuses and why. Empty while all is well or Redis cannot be reached at all.
        self.refusal = ""

    @property
    def ongoing(self) -> bool:
        """Whether the last attempt failed."""
        return bool(self._said)

    @contextmanager
    def bridged(self) -> Iterator[None]:
        """Wraps one attempt. A failure in Redis ends the block but does not raise."""
        try:
            yield
        except (RedisError, OSError) as error:
            self.failed(error)
        else:
            self.over()

    def failed(self, error: Exception) -> None:
        """Reports that an attempt failed."""
        said = f"{self._lost}: {reason(error)}"
        if type(error) not in self._said:
            self._log.warning(said)
        self._said.add(type(error))
        self.refusal = said if isinstance(error, ResponseError) else ""

    def over(self) -> None:
        """Reports that an attempt succeeded."""
        if self._said:
            self._log.info(self._back)
        self._said.clear()
        self.refusal = ""
