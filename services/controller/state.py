"""What a controller resumes from after a restart or a change of leaders: SLO, pins, plan, bars."""

from pydantic import ConfigDict, ValidationError
from redis.asyncio import Redis

from helios import orders
from helios.errors import SettingsError
from helios.orders import MODE_FIELD, STATE_FIELD, Orders
from helios.redis_schema import CONTROLLER_STATE
from helios.slo import Slo
from services.controller.leader import Leadership
from services.controller.situation import Bar

EVERY_WORKER = orders.EVERY_WORKER
# KEYS 3: state. ARGV from 3 on: two fields and their values.
_SAVE = "redis.call('HSET', KEYS[3], ARGV[3], ARGV[4], ARGV[5], ARGV[6]) return 1"


class ControllerState(Orders):
    """The orders, which workers read as well, and what only controllers go by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slo: Slo = Slo()
    bars: tuple[Bar, ...] = ()


async def load(redis: Redis) -> ControllerState | None:
    """The state that the last leader saved, or None.

    Raises SettingsError when it cannot be read, redis.RedisError when Redis cannot be reached.
    """
    saved = await redis.hget(CONTROLLER_STATE, STATE_FIELD)
    if saved is None:
        return None
    try:
        return ControllerState.model_validate_json(saved)
    except ValidationError as error:
        raise SettingsError(
            f"the controller's state in Redis ({CONTROLLER_STATE}) cannot be read, delete it to start "
            f"anew: {error.error_count()} fields are wrong, first {error.errors()[0]['loc']}"
        ) from error


async def save(leadership: Leadership, state: ControllerState, mode: str) -> None:
    """Replaces the state; `mode` tells workers whether the plan in it is in force.

    Raises StaleLeaderError, redis.RedisError.
    """
    values = (STATE_FIELD, state.model_dump_json(), MODE_FIELD, mode)
    await leadership.write(_SAVE, (CONTROLLER_STATE,), values)
