"""The served plan: the one value that gateway, controller, workers and engine share."""

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
