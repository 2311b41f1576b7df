"""The worker's announcement in Redis, kept alive by a heartbeat."""

import asyncio
import logging

from redis.asyncio import Redis

from helios import registry
from helios.redis_outage import RedisOutage

log = logging.getLogger(__name__)


async def keep_announced(redis: Redis, lease: registry.WorkerLease, lease_seconds: float) -> None:
    """Renews the lease three times in its lifetime, until cancelled. Then withdraws it.

    A Redis outage is logged once and retried. Gateways that know this worker continue to use it.
    """
    outage = RedisOutage(log, "cannot announce in Redis, trying again", "announced in Redis again")
    try:
        while True:
            with outage.bridged():
                await registry.announce(redis, lease, lease_seconds)
            await asyncio.sleep(lease_seconds / 3)
    finally:
        if not outage.ongoing:
            await registry.withdraw(redis, lease.worker_id)
