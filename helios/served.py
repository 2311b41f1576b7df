"""What is served: the one value that gateway, controller, workers and engine share."""

from pydantic import BaseModel, ConfigDict, Field


class ServedPlan(BaseModel):
    """A model, and how many of its layers are loaded.

    It is kept in Redis (orders, decisions), so fields that only a newer version knows are ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    depth: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.model} at depth {self.depth}"
