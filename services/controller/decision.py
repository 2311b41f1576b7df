"""A decision: every option that was considered, the choice, and the reason."""

from collections.abc import Mapping

from helios.served import ServedPlan
from services.controller.situation import Record, Trigger


class Option(Record):
    """One plan that was considered. Figures are expectations for one worker."""

    model: str
    depth: int
    tokens_per_second: float
    """With the largest batch that fits into memory. Includes the prefill of new requests."""
    batch: int
    tpot_seconds: float
    """At the present load, as is the time to the first token."""
    ttft_seconds: float
    perplexity_increase: float
    """Relative to the best candidate at full depth on the same requests.

    It is measured per byte of text and expressed per token of that candidate.
    """
    perplexity_increase_error: float | None = None
    """Its standard error. None: measured on too few requests."""
    agreement: float
    exit_share: float
    joules_per_token: float | None
    cost_seconds: float
    """One-time cost: the load, and a new prefill of the sequences in flight."""
    loss: float
    """The value that the objective minimises. The cost is spread over the requests of one interval."""
    refused: str = ""

    @property
    def plan(self) -> ServedPlan:
        """Model and depth."""
        return ServedPlan(model=self.model, depth=self.depth)


class WorkerPlan(Record):
    """A plan chosen for one worker. With a set, a worker has several."""

    worker_id: str
    model: str
    depth: int
    pinned: bool


class Decision(Record):
    """The choice, the options, and the reason."""

    trigger: Trigger
    before: ServedPlan | None
    plan: ServedPlan | None
    """For all workers that are not pinned. None: there are no options to choose from."""
    plans_before: Mapping[str, tuple[ServedPlan, ...]] = {}
    plans: Mapping[str, tuple[ServedPlan, ...]] = {}
    """The sets from which a router chooses, by worker as in `SetOffer`. Empty: `plan` serves all."""
    chosen: tuple[WorkerPlan, ...]
    options: tuple[Option, ...]
    reason: str
    again_after_requests: int | None = None
    """Finished requests until a better plan may be chosen. None: the dwell did not keep a better plan out."""
    undecided: tuple[str, ...] = ()
    """Models of which more requests should be evaluated, because chance may have decided."""
    urgent: bool = False
    """Whether workers load at full speed: the old plan breaks a bound or no longer fits the traffic."""

    @property
    def moves(self) -> bool:
        """Whether the plan, or a set of plans, differs from that before."""
        return self.plan != self.before or self.plans != self.plans_before
