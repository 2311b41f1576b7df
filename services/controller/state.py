"""What a controller resumes from after a restart or a change of leaders: SLO, pins, plan, bars."""

from collections.abc import Mapping

from pydantic import ValidationError
from redis.asyncio import Redis

from helios.errors import SettingsError
from helios.redis_schema import CONTROLLER_STATE
from helios.slo import Slo
from services.controller.leader import Leadership
from services.controller.situation import Bar, Plan, Record

EVERY_WORKER = ""
_FIELD = "state"
# KEYS 3: state. ARGV 3, 4: field and value.
_SAVE = "redis.call('HSET', KEYS[3], ARGV[3], ARGV[4]) return 1"


class ControllerState(Record):
    """The orders of operators and the plan in force."""

    slo: Slo = Slo()
    pins: Mapping[str, Plan] = {}
    """By worker id; EVERY_WORKER holds all that have no pin of their own, future ones included."""
    plan: Plan | None = None
    bars: tuple[Bar, ...] = ()

    def pin_of(self, worker_id: str) -> Plan | None:
        """The plan that an operator holds a worker at."""
        return self.pins.get(worker_id) or self.pins.get(EVERY_WORKER)

    def wanted(self, worker_id: str) -> Plan | None:
        """What a worker is to serve; None: whatever it does."""
        return self.pin_of(worker_id) or self.plan


async def load(redis: Redis) -> ControllerState | None:
    """The state that the last leader saved, or None.

    Raises SettingsError when it cannot be read, redis.RedisError when Redis cannot be reached.
    """
    saved = await redis.hget(CONTROLLER_STATE, _FIELD)
    if saved is None:
        return None
    try:
        return ControllerState.model_validate_json(saved)
    except ValidationError as error:
        raise SettingsError(
            f"the controller's state in Redis ({CONTROLLER_STATE}) cannot be read, delete it to start "
            f"anew: {error.error_count()} fields are wrong, first {error.errors()[0]['loc']}"
        ) from error


async def save(leadership: Leadership, state: ControllerState) -> None:
    """Replaces the state. Raises StaleLeaderError, redis.RedisError."""
    await leadership.write(_SAVE, (CONTROLLER_STATE,), (_FIELD, state.model_dump_json()))
