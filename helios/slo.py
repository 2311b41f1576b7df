"""The service level objective (SLO): the figure to optimise, and bounds on the others."""

import enum
import math
from dataclasses import dataclass

from helios.errors import InvalidRequestError
from helios.v1 import controller_pb2


class Objective(enum.StrEnum):
    """The figure to optimise."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"
    ENERGY = "energy"
    ACCURACY = "accuracy"

    @classmethod
    def from_proto(cls, value: controller_pb2.Objective.ValueType) -> "Objective | None":
        """None: it is unset, or of another version."""
        return _BY_VALUE.get(value)

    def to_proto(self) -> controller_pb2.Objective.ValueType:
        """Converts the objective to its number in protos."""
        return _OBJECTIVES[self]


_OBJECTIVES = {
    Objective.THROUGHPUT: controller_pb2.OBJECTIVE_THROUGHPUT,
    Objective.LATENCY: controller_pb2.OBJECTIVE_LATENCY,
    Objective.ENERGY: controller_pb2.OBJECTIVE_ENERGY,
    Objective.ACCURACY: controller_pb2.OBJECTIVE_ACCURACY,
}
_BY_VALUE = {value: objective for objective, value in _OBJECTIVES.items()}


@dataclass(frozen=True, slots=True)
class Slo:
    """An objective and its bounds. None: no bound.

    `max_perplexity_increase` is relative to the best candidate at full depth on the same requests.
    `min_agreement` is the share of tokens that equal the full model's. Times are in seconds.
    """

    objective: Objective = Objective.THROUGHPUT
    max_perplexity_increase: float | None = 0.05
    min_agreement: float | None = None
    max_ttft_seconds: float | None = None
    max_tpot_seconds: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequestError naming the bound that is out of range."""
        for name in ("max_perplexity_increase", "max_ttft_seconds", "max_tpot_seconds"):
            value = getattr(self, name)
            lowest = 0 if name == "max_perplexity_increase" else math.ulp(0)
            if value is not None and not lowest <= value < math.inf:
                raise InvalidRequestError(f"slo.{name} must be a finite number above 0, not {value}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise InvalidRequestError(f"slo.min_agreement must be in [0, 1], not {self.min_agreement}")

    @classmethod
    def from_proto(cls, message: controller_pb2.Slo) -> "Slo":
        """Raises InvalidRequestError for an unset objective or a bound out of range."""
        objective = Objective.from_proto(message.objective)
        if objective is None:
            names = ", ".join(Objective)
            raise InvalidRequestError(f"slo.objective must be set to one of {names}")

        present = {field.name for field, _ in message.ListFields()}

        def bound(name: str) -> float | None:
            return getattr(message, name) if name in present else None

        return cls(
            objective,
            bound("max_perplexity_increase"),
            bound("min_agreement"),
            bound("max_ttft_seconds"),
            bound("max_tpot_seconds"),
        )

    def to_proto(self) -> controller_pb2.Slo:
        """Converts the SLO to a message."""
        return controller_pb2.Slo(
            objective=self.objective.to_proto(),
            max_perplexity_increase=self.max_perplexity_increase,
            min_agreement=self.min_agreement,
            max_ttft_seconds=self.max_ttft_seconds,
            max_tpot_seconds=self.max_tpot_seconds,
        )
