"""What was decided: every option that was weighed, the choice, and why."""

from services.controller.situation import Plan, Record, Trigger


class Option(Record):
    """One plan that was weighed. Figures are expectations for one worker."""

    model: str
    depth: int
    tokens_per_second: float
    """With the largest batch that memory allows, prefill of new requests included."""
    batch: int
    tpot_seconds: float
    """At the present load, as is the time to the first token."""
    ttft_seconds: float
    perplexity_increase: float
    """Over the best candidate at full depth on the same requests, per byte of text, as a share per token
    of that candidate."""
    perplexity_increase_error: float | None = None
    """Its standard error; None: measured on too few requests to tell."""
    agreement: float
    exit_share: float
    joules_per_token: float | None
    cost_seconds: float
    """Once: the load, and the prefill of what is in flight."""
    loss: float
    """What the objective minimises, the cost spread over the requests of one interval."""
    refused: str = ""

    @property
    def plan(self) -> Plan:
        """The model and depth."""
        return Plan(model=self.model, depth=self.depth)


class WorkerPlan(Record):
    """What one worker is to serve."""

    worker_id: str
    model: str
    depth: int
    pinned: bool


class Decision(Record):
    """The choice, what else was weighed, and why."""

    trigger: Trigger
    before: Plan | None
    plan: Plan | None
    """For all workers that are not pinned. None: nothing is known to choose from."""
    chosen: tuple[WorkerPlan, ...]
    options: tuple[Option, ...]
    reason: str
    again_after_requests: int | None = None
    """Finished requests until a better plan may be chosen that only the dwell of this one kept out."""
    undecided: tuple[str, ...] = ()
    """Models of which more requests should be evaluated: chance may have decided."""
    urgent: bool = False
    """Whether workers load the plan at full speed: the one before breaks a bound, or traffic has left it."""

    @property
    def moves(self) -> bool:
        """Whether it is another plan than before."""
        return self.plan != self.before
