"""The served plan: the one value that gateway, controller, workers and engine share."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field


class ServedPlan(BaseModel):
    """A model, and the number of its loaded layers.

    It is stored in Redis (orders, decisions), so unknown fields of a newer version are ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    depth: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.model} at depth {self.depth}"


def successor(plan: ServedPlan, in_force: Sequence[ServedPlan]) -> ServedPlan:
    """The plan under which a sequence or stream goes on that had `plan`: that one, if it is in force.

    Otherwise it is the shallowest of the same model that is at least as deep, else the deepest of the same
    model, else the first one. in_force: at least one.
    """
    same = sorted((one for one in in_force if one.model == plan.model), key=lambda one: one.depth)
    deep_enough = (one for one in same if one.depth >= plan.depth)
    return next(deep_enough, same[-1] if same else in_force[0])
