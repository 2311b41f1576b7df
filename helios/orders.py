"""What workers must serve: the orders of the leading controller, as they are in Redis.

The controller writes them with the rest of its state (`services/controller/state.py`). A worker reads them
when it starts, so that it need not serve another plan until the controller gets to it.
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
    """The pins of operators, and the plan that the policy has chosen."""

    # The controller's state, which is kept in the same place, has more fields.
    model_config = ConfigDict(frozen=True, extra="ignore")

    pins: Mapping[str, ServedPlan] = {}
    """By worker id. EVERY_WORKER pins all that have no pin of their own, future ones included."""
    plan: ServedPlan | None = None

    def pin_of(self, worker_id: str) -> ServedPlan | None:
        """The plan that an operator has pinned a worker to; None: no pin holds it."""
        return self.pins.get(worker_id) or self.pins.get(EVERY_WORKER)

    def wanted(self, worker_id: str) -> ServedPlan | None:
        """What a worker must serve; None: whatever it serves now."""
        return self.pin_of(worker_id) or self.plan


async def read(redis: Redis) -> Orders:
    """The orders in force; empty ones when there are none.

    Pins are in force until they are taken back. The plan is in force only while a controller in active mode
    leads: in other modes it only advises, and the plan of a stack that has ended does not bind the next
    stack.

    Raises redis.RedisError when Redis cannot be reached, pydantic.ValidationError when the entry does not
    hold orders of this version.
    """
    saved, mode = cast("list[bytes | None]", await redis.hmget(CONTROLLER_STATE, [STATE_FIELD, MODE_FIELD]))
    if saved is None:
        return Orders()
    orders = Orders.model_validate_json(saved)
    if mode == ACTIVE.encode() and await redis.exists(CONTROLLER_LEADER):
        return orders
    return orders.model_copy(update={"plan": None})
