"""The last router in Redis, from which restarted workers start and controllers go on counting."""

from typing import NamedTuple

from helios.errors import InvalidRequestError
from helios.redis_schema import ROUTER
from helios.routing.router import Router
from services.controller.leader import Leadership

_SAVE = "redis.call('SET', KEYS[3], ARGV[3]) return 1"
_DELETE = "redis.call('DEL', KEYS[3]) return 1"


class Stored(NamedTuple):
    """The number of the last router, and why it is set aside if it cannot be used, in words."""

    number: int = 0
    problem: str = ""


async def find(leadership: Leadership) -> Stored | None:
    """What is in Redis. None: there is no router. Raises redis.RedisError."""
    saved = await leadership.redis.get(ROUTER)
    if saved is None:
        return None
    try:
        return Stored(Router.from_json(saved).number)
    except InvalidRequestError as error:
        return Stored(problem=f"the router in Redis ({ROUTER}) is set aside and learnt anew: {error.message}")


async def save(leadership: Leadership, router: bytes) -> None:
    """Replaces the router. Raises StaleLeaderError, redis.RedisError."""
    await leadership.write(_SAVE, (ROUTER,), (router.decode(),))


async def delete(leadership: Leadership) -> None:
    """Removes the router. Raises StaleLeaderError, redis.RedisError."""
    await leadership.write(_DELETE, (ROUTER,), ())
