"""The state that a controller resumes after a restart or a change of leader: SLO, pins, plan, bars."""

import json
from typing import Any

from pydantic import ConfigDict, ValidationError
from redis.asyncio import Redis

from helios.errors import InvalidRequestError, SettingsError
from helios.ignored_entries import fault
from helios.orders import MODE_FIELD, STATE_FIELD, Orders
from helios.redis_schema import CONTROLLER_STATE
from helios.slo import Slo
from services.controller.leader import Leadership
from services.controller.situation import Bar

# KEYS 3: state. ARGV from 3 on: two fields and their values.
_SAVE = "redis.call('HSET', KEYS[3], ARGV[3], ARGV[4], ARGV[5], ARGV[6]) return 1"


class ControllerState(Orders):
    """The orders, which workers read too, and data that only controllers need."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    slo: Slo = Slo()
    bars: tuple[Bar, ...] = ()


async def load(redis: Redis) -> ControllerState | None:
    """The state that the last leader saved, or None.

    Raises SettingsError when it cannot be read, redis.RedisError when Redis cannot be reached.
    """
    saved = await redis.hget(CONTROLLER_STATE, STATE_FIELD)
    return None if saved is None else _parsed(saved)


async def save(leadership: Leadership, state: ControllerState, mode: str) -> None:
    """Replaces the state. Fields of a newer version are kept if the part around them has not changed.

    `mode` tells workers whether the plan is in force. Raises SettingsError when the saved state cannot be
    read, StaleLeaderError, redis.RedisError.
    """
    document = state.model_dump(mode="json")
    # No other replica writes between this read and the write, which is refused unless this one leads.
    saved = await leadership.redis.hget(CONTROLLER_STATE, STATE_FIELD)
    if saved is not None:
        understood, raw = _parsed(saved).model_dump(mode="json"), json.loads(saved)
        unknown = {name: value for name, value in raw.items() if name not in understood}
        document = unknown | _with_unknown(raw, understood, document)
    values = (STATE_FIELD, json.dumps(document), MODE_FIELD, mode)
    await leadership.write(_SAVE, (CONTROLLER_STATE,), values)


def _parsed(saved: bytes | str) -> ControllerState:
    try:
        return ControllerState.model_validate_json(saved)
    except (ValidationError, InvalidRequestError) as error:
        raise SettingsError(
            f"the controller's state in Redis ({CONTROLLER_STATE}) cannot be read, delete it to start "
            f"anew: {fault(error)}"
        ) from error


def _with_unknown(raw: Any, understood: Any, now: Any) -> Any:
    """`now` as JSON. Parts that equal those `understood` of `raw` are taken unchanged from `raw`."""
    if now == understood:
        return raw
    if isinstance(now, dict) and isinstance(understood, dict):
        return {
            name: _with_unknown(raw[name], understood[name], value) if name in raw else value
            for name, value in now.items()
        }
    if isinstance(now, list):
        return [raw[understood.index(one)] if one in understood else one for one in now]
    # A number, a text, or a dictionary that replaces None.
    return now
