"""Finds the router that a worker starts with: the last one that a controller has stored in Redis."""

import asyncio
import logging
from typing import cast

from redis.exceptions import RedisError

from helios import redis_client
from helios.errors import InvalidRequestError
from helios.redis_schema import ROUTER
from helios.routing.router import Router

log = logging.getLogger(__name__)

# Time limit for Redis: a worker that cannot reach it starts this much later.
_REDIS_SECONDS = 2.0


async def find(redis_url: str | None) -> Router | None:
    """The last router. None: there is none, or it cannot be used.

    Never raises, and takes at most a few seconds. Faults of Redis or of the entry are logged.
    """
    if redis_url is None:
        return None
    try:
        async with asyncio.timeout(_REDIS_SECONDS), redis_client.connect(redis_url) as redis:
            saved = cast("bytes | None", await redis.get(ROUTER))
        return None if saved is None else Router.from_json(saved)
    except (RedisError, OSError, InvalidRequestError) as error:  # TimeoutError is an OSError.
        reason = str(error) or f"no answer in {_REDIS_SECONDS:g} s"
        log.warning("starting without a router, the one in Redis cannot be used: %s", reason)
        return None
