"""What a client may ask of the choice of its request's plan."""

import math
from dataclasses import dataclass
from typing import ClassVar

from helios.errors import InvalidRequestError
from helios.slo import Objective
from helios.v1 import controller_pb2, inference_pb2, worker_pb2


@dataclass(frozen=True, slots=True)
class Preference:
    """A bound and an objective for one request. None: the operator's.

    max_perplexity_increase: the largest expected rise of the request's perplexity over the best model with
    all layers, a share.
    """

    OBJECTIVES: ClassVar[tuple[Objective, ...]] = (Objective.THROUGHPUT, Objective.LATENCY)

    max_perplexity_increase: float | None = None
    objective: Objective | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequestError naming the field that is out of range."""
        increase = self.max_perplexity_increase
        if increase is not None and not 0 <= increase < math.inf:
            raise InvalidRequestError(
                f"max_perplexity_increase must be a finite number of at least 0, not {increase}"
            )
        if self.objective is not None and self.objective not in self.OBJECTIVES:
            raise InvalidRequestError(
                f"objective must be {_names()} for a single request, not {self.objective}"
            )

    @classmethod
    def from_proto(cls, message: inference_pb2.GenerateRequest | worker_pb2.Route) -> "Preference":
        """Raises InvalidRequestError naming the field that is out of range."""
        objective = Objective.from_proto(message.objective)
        if objective is None and message.objective != controller_pb2.OBJECTIVE_UNSPECIFIED:
            raise InvalidRequestError(f"objective must be {_names()}, not {message.objective}")
        increase = message.max_perplexity_increase if message.HasField("max_perplexity_increase") else None
        return cls(increase, objective)

    def to_proto(self) -> worker_pb2.Route:
        """Converts the preference to the message that workers get."""
        route = worker_pb2.Route(max_perplexity_increase=self.max_perplexity_increase)
        if self.objective is not None:
            route.objective = self.objective.to_proto()
        return route


def _names() -> str:
    return " or ".join(Preference.OBJECTIVES)
