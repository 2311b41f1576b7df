"""The input of a decision. It is kept as JSON, so that the decision can be replayed from the record."""

import enum
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from helios.history import ModelProfile
from helios.served import ServedPlan
from helios.slo import Slo


class Record(BaseModel):
    """Base of stored records: immutable. Unknown fields of a newer version are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Trigger(enum.StrEnum):
    """The event that a decision answers."""

    START = "start"
    REASSESSMENT = "reassessment"
    DWELL = "dwell over"
    FOLLOW_UP = "follow-up"
    DRIFT = "drift"
    RETREAT = "drift, not evaluated yet"
    BREACH = "confidence breach"
    SLO = "SLO"
    OPERATOR = "operator"
    FAILURE = "failed reload"
    ROUTING = "routing"


class Bar(Record):
    """A plan that failed in service. It is excluded until its model is profiled again."""

    model: str
    depth: int
    time: float
    reason: str
    shallower: bool = False
    """Whether all shallower depths are excluded, too."""

    def covers(self, profile: ModelProfile, depth: int) -> bool:
        """Whether it excludes this depth of this profile."""
        hit = depth == self.depth or (self.shallower and depth < self.depth)
        return self.model == profile.model and hit and profile.time <= self.time


class WorkerView(Record):
    """One worker as the policy sees it."""

    worker_id: str
    model: str
    depth: int
    tokenizer_id: str
    pinned: bool = False
    running: int = 0
    waiting: int = 0
    tokens_in_flight: int = 0
    window_tokens: int = 0
    """Generated tokens in the breach counter's window. The next field counts the unsure ones among them."""
    window_high_exit_tokens: int = 0
    threshold: float | None = None
    """Confidence below which the worker counts a token as unsure. None: the profile's."""
    max_running: int = Field(ge=1)
    memory_bytes: int | None = None
    """Bytes for weights and KV together. None: more than its present plan can use."""

    @property
    def plan(self) -> ServedPlan:
        """The plan that it serves."""
        return ServedPlan(model=self.model, depth=self.depth)


class Reading(Record):
    """Nats of recent prompts under the plan that served them."""

    model: str
    depth: int
    nats_per_token: float
    error: float
    """Its standard error."""


class SetOffer(Record):
    """Plans from which a router would choose for each request, and what is expected of that."""

    plans: Mapping[str, tuple[ServedPlan, ...]]
    """By worker id. EVERY_WORKER (helios.orders): of all other workers."""
    seconds: float = Field(gt=0)
    """Expected seconds of a token, probes included."""
    single: ServedPlan
    """The quickest plan that alone would keep the bound for the same requests, and its seconds."""
    single_seconds: float = Field(gt=0)
    examples: int
    price: float
    """Seconds per nat of a token."""
    increase: float
    """Expected rise of perplexity, a share. The next field is its standard error."""
    error: float
    served_surprise: float | None = None
    """Nats a token of the last routed prompts above what was expected. None: too few. Then its error."""
    served_error: float | None = None
    is_best_effort: bool = False
    """Whether the bound is tighter than what is known can hold."""
    unlike_share: float = 0.0
    """Share of the newest prompts that are unlike all that was learnt from."""


class Situation(Record):
    """The complete input of a decision."""

    trigger: Trigger
    slo: Slo
    history: Mapping[str, ModelProfile]
    candidates: tuple[str, ...]
    workers: tuple[WorkerView, ...]
    plan: ServedPlan | None = None
    """The plan in force for workers that are not pinned. None: none was ever chosen."""
    plans: Mapping[str, tuple[ServedPlan, ...]] = {}
    """The sets in force from which a router chooses, by worker as in `SetOffer`. Empty: none are."""
    offer: SetOffer | None = None
    no_offer: str = ""
    """Why there is no offer, if a router is wanted."""
    reading: Reading | None = None
    bars: tuple[Bar, ...] = ()
    delayed_seconds: float = 0.0
    """How long this reassessment was postponed to keep profiling within its share of the CPU."""
    requests_since_move: int | None = None
    """None: the plan has never been moved."""
    prompt_tokens: float = Field(gt=0)
    """Mean number of prompt tokens per request. The next field is the mean number of generated tokens."""
    output_tokens: float = Field(gt=0)

    @property
    def free(self) -> tuple[WorkerView, ...]:
        """Workers that no operator has pinned."""
        return tuple(worker for worker in self.workers if not worker.pinned)
