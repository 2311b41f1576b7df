"""Workers announce themselves here: one lease per worker in Redis, renewed by a heartbeat.

The value is a JSON object with the fields of WorkerLease. It expires at the end of the lease
(`helios.redis_schema`). Fields that this version does not know are ignored.
"""

import json
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter
from redis.asyncio import Redis

from helios.ignored_entries import fault
from helios.redis_schema import WORKER_PREFIX


@dataclass(frozen=True, slots=True)
class WorkerLease:
    """A worker's announcement. `address` is the host:port at which gateways reach it."""

    worker_id: str
    address: str


_LEASE = TypeAdapter(WorkerLease)


async def announce(redis: Redis, lease: WorkerLease, lease_seconds: float) -> None:
    """Writes or renews a lease. Raises redis.RedisError when Redis cannot be reached."""
    await redis.set(WORKER_PREFIX + lease.worker_id, json.dumps(asdict(lease)), px=int(lease_seconds * 1000))


async def withdraw(redis: Redis, worker_id: str) -> None:
    """Ends a lease at once, for a worker that stops."""
    await redis.delete(WORKER_PREFIX + worker_id)


async def leases(redis: Redis) -> tuple[list[WorkerLease], dict[str, str]]:
    """All valid leases ordered by id, and the ignored keys with the reason.

    Raises redis.RedisError when Redis cannot be reached.
    """
    keys = sorted([key async for key in redis.scan_iter(match=WORKER_PREFIX + "*", count=100)])
    values = await redis.mget(keys) if keys else []
    found, ignored = [], {}
    for key, value in zip(keys, values, strict=True):
        name = key.decode(errors="replace")
        # MGET returns None both for a missing key and for a key that is not a string.
        if value is None and await redis.type(key) in (b"none", b"string"):
            continue
        try:
            found.append(_parsed(name, value))
        except ValueError as error:
            ignored[name] = f"not a worker's lease: {fault(error)}"
    return sorted(found, key=lambda lease: lease.worker_id), ignored


def _parsed(key: str, value: bytes | str | None) -> WorkerLease:
    """Raises ValueError, which includes pydantic.ValidationError."""
    if value is None:
        raise ValueError("it is not a string")
    lease = _LEASE.validate_json(value)
    if key != WORKER_PREFIX + lease.worker_id:
        raise ValueError(f"it is of the worker {lease.worker_id!r}")
    host, _, port = lease.address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"address: {lease.address!r} is not host:port")
    return lease
