"""Orders: the plans that workers must serve, as the leading controller stores them in Redis.

The controller writes them with the rest of its state (`services/controller/state.py`). A worker reads them
when it starts, so that it need not serve another plan until the controller reaches it.
"""

from collections.abc import Mapping
from typing import cast

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis

from helios.redis_schema import CONTROLLER_LEADER, CONTROLLER_STATE
from helios.served import ServedPlan

EVERY_WORKER = ""
# Fields of the hash CONTROLLER_STATE: the state as JSON, and the mode of the controller that wrote it.
STATE_FIELD = "state"
MODE_FIELD = "mode"
ACTIVE = "active"


class Orders(BaseModel):
    """The operators' pins, and the plans chosen by the policy."""

    # The same entry also holds the rest of the controller's state.
    model_config = ConfigDict(frozen=True, extra="ignore")

    pins: Mapping[str, ServedPlan] = {}
    """By worker id. EVERY_WORKER pins all workers without their own pin, including future ones."""
    plan: ServedPlan | None = None
    plans: Mapping[str, tuple[ServedPlan, ...]] = {}
    """The sets of plans from which a router chooses, by worker id. EVERY_WORKER: of all other workers.

    A worker without a set serves `plan`.
    """

    def pin_of(self, worker_id: str) -> ServedPlan | None:
        """The plan to which an operator has pinned a worker. None: the worker is not pinned."""
        return self.pins.get(worker_id) or self.pins.get(EVERY_WORKER)

    def wanted(self, worker_id: str) -> ServedPlan | None:
        """The first plan that a worker must serve. None: it keeps its current plans."""
        return next(iter(self.wanted_plans(worker_id)), None)

    def wanted_plans(self, worker_id: str) -> tuple[ServedPlan, ...]:
        """All plans that a worker must serve, the first one first. Empty: it keeps its current plans."""
        pin = self.pin_of(worker_id)
        if pin is not None:
            return (pin,)
        in_set = self.plans.get(worker_id) or self.plans.get(EVERY_WORKER)
        return in_set or (() if self.plan is None else (self.plan,))


async def read(redis: Redis) -> Orders:
    """The orders in force. Empty if there are none.

    Pins are in force until they are removed. The plans are in force only while a controller in active mode
    leads. In other modes they are only advice, and those of a stack that has ended do not bind the next
    stack.

    Raises redis.RedisError when Redis cannot be reached, pydantic.ValidationError when the entry holds no
    orders of this version.
    """
    saved, mode = cast("list[bytes | None]", await redis.hmget(CONTROLLER_STATE, [STATE_FIELD, MODE_FIELD]))
    if saved is None:
        return Orders()
    orders = Orders.model_validate_json(saved)
    if mode == ACTIVE.encode() and await redis.exists(CONTROLLER_LEADER):
        return orders
    return orders.model_copy(update={"plan": None, "plans": {}})
