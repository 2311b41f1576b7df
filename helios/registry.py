"""Where workers announce themselves: a lease per worker in Redis, renewed by a heartbeat.

The value is a JSON object with the fields of WorkerLease, expiring after
the lease's seconds (`helios.redis_schema`).
"""

import json
from dataclasses import asdict, dataclass

from redis.asyncio import Redis

from helios.redis_schema import WORKER_PREFIX


@dataclass(frozen=True, slots=True)
class WorkerLease:
    """A worker's announcement. `address` is host:port as gateways reach it."""

    worker_id: str
    address: str


async def announce(redis: Redis, lease: WorkerLease, lease_seconds: float) -> None:
    """Writes or renews a lease. Raises redis.RedisError when Redis cannot be reached."""
    await redis.set(WORKER_PREFIX + lease.worker_id, json.dumps(asdict(lease)), px=int(lease_seconds * 1000))


async def withdraw(redis: Redis, worker_id: str) -> None:
    """Ends a lease at once, as a worker that stops does."""
    await redis.delete(WORKER_PREFIX + worker_id)


async def leases(redis: Redis) -> list[WorkerLease]:
    """All living leases, in the order of their ids."""
    keys = [key async for key in redis.scan_iter(match=WORKER_PREFIX + "*", count=100)]
    values = await redis.mget(keys) if keys else []
    found = [WorkerLease(**json.loads(value)) for value in values if value is not None]
    return sorted(found, key=lambda lease: lease.worker_id)
