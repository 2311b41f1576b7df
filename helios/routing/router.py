"""Chooses a plan for a prompt that was probed. Replaced at the merge: only the public names are final."""

from collections.abc import Collection
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from helios.errors import InvalidRequestError
from helios.routing.probe import Probe
from helios.served import ServedPlan
from helios.slo import Objective


@dataclass(frozen=True, slots=True)
class RankedPlan:
    """A plan that may serve a request, and what it costs over the best one."""

    plan: ServedPlan
    extra_seconds_per_token: float
    expected_perplexity_increase: float
    reason: str


class Router(BaseModel):
    """Ranks plans in a fixed order."""

    model_config = ConfigDict(frozen=True)

    number: int
    ranking: tuple[RankedPlan, ...]

    @property
    def first_model(self) -> str:
        """The model that is probed first."""
        return self.ranking[0].plan.model

    @classmethod
    def from_json(cls, data: bytes) -> "Router":
        """Raises InvalidRequestError."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidRequestError(f"not a router of this version: {error}") from error

    def rank(
        self,
        probe: Probe,  # noqa: ARG002
        *,
        lot: float,  # noqa: ARG002
        is_complete: bool,  # noqa: ARG002
        max_perplexity_increase: float | None = None,  # noqa: ARG002
        objective: Objective | None = None,  # noqa: ARG002
        among: Collection[ServedPlan] | None = None,
    ) -> list[RankedPlan] | None:
        """The plans within the bound, the best first. Never empty. None: all readings are needed."""
        return [one for one in self.ranking if among is None or one.plan in among] or list(self.ranking[:1])
