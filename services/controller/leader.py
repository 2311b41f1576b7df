"""One leader among the replicas of the controller: a lock in Redis that expires, with a fencing number.

The number grows with each leader. Every write of a leader carries it, and is refused once there is a newer
leader. So a leader that was paused and continues late does no harm (Kleppmann, "How to do distributed
locking").
"""

import time
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis

from helios.errors import UnavailableError
from helios.ignored_entries import fault
from helios.redis_schema import CONTROLLER_FENCE, CONTROLLER_LEADER

# KEYS: leader, fence. ARGV: id, address, milliseconds.
_ACQUIRE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local fence = redis.call('INCR', KEYS[2])
local holder = cjson.encode({controller_id = ARGV[1], address = ARGV[2], fence = fence})
redis.call('SET', KEYS[1], holder, 'PX', ARGV[3])
return fence
"""

# An unreadable lock is not ours. It is not taken over either, because a newer version may hold it.
_HOLDER = """
local function holder_of(held)
  local read, holder = pcall(cjson.decode, held)
  return read and type(holder) == 'table' and holder or {}
end
"""

# KEYS: leader. ARGV: id, fence, milliseconds (0: release it).
_RENEW = (
    _HOLDER
    + """
local held = redis.call('GET', KEYS[1])
if not held then return 0 end
local holder = holder_of(held)
if holder.controller_id ~= ARGV[1] or holder.fence ~= tonumber(ARGV[2]) then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""
)

# Runs before a leader's writes. KEYS: leader, fence, ...; ARGV: id, fence, ...
_GUARD = (
    _HOLDER
    + """
local held = redis.call('GET', KEYS[1])
if redis.call('GET', KEYS[2]) ~= ARGV[2] then return false end
if held and holder_of(held).controller_id ~= ARGV[1] then return false end
"""
)


class StaleLeaderError(UnavailableError):
    """This replica no longer leads: another one does, or Redis has lost the lock."""


@dataclass(frozen=True, slots=True)
class Leader:
    """The replica that leads. `address` is the host:port at which others reach it."""

    controller_id: str
    address: str
    fence: int


_LEADER = TypeAdapter(Leader)


async def find_leader(redis: Redis) -> Leader | None:
    """The current leader.

    Raises UnavailableError when the lock cannot be read, redis.RedisError when Redis cannot be reached.
    """
    held = await redis.get(CONTROLLER_LEADER)
    if held is None:
        return None
    try:
        return _LEADER.validate_json(held)
    except ValidationError as error:
        raise UnavailableError(
            f"the leader's lock in Redis ({CONTROLLER_LEADER}) cannot be read, so that nobody can lead; "
            f"delete it: {fault(error)}"
        ) from error


class Leadership:
    """This replica's side of the leader election."""

    def __init__(self, redis: Redis, controller_id: str, address: str, lease_seconds: float) -> None:
        """`controller_id` is unique to this process. A restarted process has another one."""
        self.controller_id = controller_id
        # How often this replica has taken the lock.
        self.terms = 0
        self.redis = redis
        self._address = address
        self._lease_seconds = lease_seconds
        self._fence: int | None = None
        self._valid_until = 0.0

    @property
    def is_held(self) -> bool:
        """Whether this replica leads. Becomes False by itself when the lock is not renewed in time."""
        return self._fence is not None and time.monotonic() < self._valid_until

    async def campaign(self) -> bool:
        """Renews the lock, or takes it when nobody holds it. Call it several times per lease.

        Raises redis.RedisError when Redis cannot be reached.
        """
        asked_at = time.monotonic()
        milliseconds = int(self._lease_seconds * 1000)
        if self._fence is not None:
            renewed = await self.redis.eval(
                _RENEW, 1, CONTROLLER_LEADER, self.controller_id, self._fence, milliseconds
            )
            if not renewed:
                self._fence = None
        if self._fence is None:
            keys = (CONTROLLER_LEADER, CONTROLLER_FENCE)
            fence = await self.redis.eval(_ACQUIRE, 2, *keys, self.controller_id, self._address, milliseconds)
            self._fence = int(fence) or None
            self.terms += 1 if self._fence else 0
        self._valid_until = asked_at + self._lease_seconds
        return self.is_held

    async def resign(self) -> None:
        """Releases the lock, so that another replica need not wait until it expires."""
        if self._fence is not None:
            fence, self._fence = self._fence, None
            await self.redis.eval(_RENEW, 1, CONTROLLER_LEADER, self.controller_id, fence, 0)

    async def write(self, script: str, keys: tuple[str, ...], values: tuple[str | int, ...]) -> object:
        """Runs a Lua script as the leader and returns its result. Its KEYS and ARGV begin at index 3.

        Raises StaleLeaderError when this replica does not lead. Then nothing is written.
        """
        all_keys = (CONTROLLER_LEADER, CONTROLLER_FENCE, *keys)
        result = None
        if self._fence is not None:
            result = await self.redis.eval(
                _GUARD + script, len(all_keys), *all_keys, self.controller_id, self._fence, *values
            )
        if result is None:
            raise StaleLeaderError("this controller does not lead any longer; ask the one that does")
        return result
