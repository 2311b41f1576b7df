"""Decides what the controller must do now: evaluate, decide, or nothing. Pure: no IO and no clock.

The service and the simulator of `helios bench paper` both use this agenda.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from pydantic import Field

from helios.history import ModelProfile
from helios.served import ServedPlan
from services.controller.allowance import Allowance
from services.controller.cusum import Moment, tunings
from services.controller.decision import Decision
from services.controller.policy.breach import is_breached
from services.controller.policy.settings import PolicySettings
from services.controller.situation import Bar, Reading, Trigger, WorkerView
from services.controller.traffic_watch import Served, Side, TrafficWatch

# Number of sums that may raise an alarm: two figures, each in both directions.
_TESTS = 4
_SECONDS_PER_DAY = 86400.0
# Limits on the number of requests between two false alarms, whatever the operator sets.
_FEWEST_BETWEEN_ALARMS, _MOST_BETWEEN_ALARMS = 1e3, 1e8
# The tests depend on the logarithm of the request rate. They are tuned again when the rate has changed by
# this factor.
_RETUNE_FACTOR = 1.25
# Triggers whose decisions use all evaluations so far.
_FROM_EVALUATIONS = (Trigger.START, Trigger.REASSESSMENT, Trigger.FOLLOW_UP, Trigger.DRIFT)
# Delay before a failed evaluation is tried again.
_RETRY_SECONDS = 10.0


class Detection(enum.StrEnum):
    """How a drift of the traffic is noticed."""

    SEQUENTIAL = "sequential"
    WINDOW = "window"


class AgendaSettings(PolicySettings):
    """The operator's settings for when to evaluate and when to decide."""

    detection: Detection = Field(
        Detection.SEQUENTIAL,
        description="how a drift is noticed: sequential (a CUSUM test of what prompts and tokens say) or "
        "window (the paper's rule: breach_limit unsure tokens in window_tokens)",
    )
    false_alarms_per_day: float = Field(
        24.0, gt=0, description="about how many drifts a day are noticed by mistake; each costs an evaluation"
    )
    drift_delay_requests: float = Field(
        10.0,
        ge=2,
        description="requests until a drift is noticed, on average, if it is just large enough to be told "
        "from chance by then; larger drifts are noticed sooner, smaller ones within four times as many "
        "requests; a larger value notices smaller drifts",
    )
    drift_requests: int = Field(4, ge=2, description="requests since a drift began that its evaluation needs")
    drift_patience_seconds: float = Field(
        5.0,
        ge=0,
        description="longest time that the evaluation of a drift may take; after that, workers go to the "
        "safest plan known",
    )
    follow_up_requests: int = Field(
        6,
        ge=1,
        description="while chance may have decided, more requests are evaluated: after this many have come, "
        "then after twice as many, and so on",
    )
    most_follow_up_requests: int = Field(
        12, ge=1, description="most requests that such a further evaluation runs"
    )
    breach_reassess_requests: int = Field(
        5,
        ge=1,
        description="requests after a breach of the window until the candidates are evaluated again",
    )
    profiling_share: float = Field(
        0.005,
        gt=0,
        le=1,
        description="CPU that regular reassessments may take, as a share of the workers' threads: they are "
        "put off to keep within it, those after a drift are not; 1: none is put off",
    )


@dataclass(frozen=True, slots=True)
class Evaluate:
    """The profiler must evaluate candidates on recent requests."""

    models: tuple[str, ...] = ()
    """Names of the models. Empty: all candidates."""
    requests: int | None = None
    """None: the profiler chooses the number."""
    fresh: bool = False
    """Whether the traffic seems to have changed. Then it is urgent, and few earlier requests count."""
    newest_seconds: float | None = None
    """Greatest age of an evaluated request. None: any age."""
    prompts_only: bool = False
    """Whether perplexity is enough. Then prompts are not continued, which saves half the work."""
    for_router: bool = False
    """Whether to find examples that a router learns from, instead of profiles."""


@dataclass(frozen=True, slots=True)
class Decide:
    """The policy must decide."""

    trigger: Trigger
    bar: Bar | None = None


Due: TypeAlias = Evaluate | Decide | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """The agenda's input. `workers` are those that no operator has pinned."""

    now: float
    """Time in seconds on a monotonic clock."""
    finished: int
    """Number of finished requests since the controller began to watch."""
    workers: Sequence[WorkerView]
    history: Mapping[str, ModelProfile]
    history_times: Mapping[str, float]
    can_evaluate: bool
    evaluating: bool
    moving: bool
    """Whether workers are moving to a plan, or failed to."""
    routed: bool = False
    """Whether a router chooses plans, so that only the first decision on a single plan is due."""


class Agenda:
    """Says when to evaluate and when to decide. Its owner does both and reports back."""

    def __init__(self, settings: AgendaSettings, allowance: Allowance) -> None:
        self._settings = settings
        self._allowance = allowance
        self._began: Moment | None = None
        self._started = False
        # Count of finished requests at the last evaluation. None: there was none.
        self._evaluated_at: int | None = None
        self._retry_at = -math.inf
        # Whether an evaluation has ended that no decision has used yet, and its trigger.
        self._evaluation_has_ended = False
        self._evaluated_for = Trigger.REASSESSMENT
        # The times of the profiles that the last decision used.
        self._decided_on: Mapping[str, float] = {}
        self._between_alarms = _FEWEST_BETWEEN_ALARMS
        self._tuned = tunings(self._between_alarms, settings.drift_delay_requests)
        # Watches the traffic under the plan in force. None until the plan's profile gives expectations.
        self._watch: TrafficWatch | None = None
        # A noticed drift that no evaluation has answered yet.
        self._drift: _Drift | None = None
        # The plan that was kept after the last drift, which was thus a false alarm. None: another plan was
        # chosen.
        self._false_alarm: ServedPlan | None = None
        # False alarms in a row, and the count of finished requests before which no drift is looked for.
        self._false_alarms = self._quiet_until = 0
        # The next evaluation of models for which chance may have decided. None: the decision is clear.
        self._follow_up: _FollowUp | None = None
        # In window mode: the count of finished requests at which a breach requires an evaluation, and the
        # plans whose breach has been answered.
        self._breach_due_at: int | None = None
        self._breaches_answered: set[ServedPlan] = set()
        # The count of finished requests at which the dwell ends that kept a better plan out. None: there is
        # none.
        self._dwell_over_at: int | None = None
        # Time since which a reassessment has been postponed. None: none is.
        self._delayed_since: float | None = None
        # How long the last reassessment was postponed.
        self.delayed_seconds = 0.0

    # -- events -----------------------------------------------------------------------------------

    def observe(self, served: Served, history: Mapping[str, ModelProfile], now: float) -> None:
        """Takes in what was served under the plan in force. `now` is in seconds."""
        plan = served.plan
        profile = history.get(plan.model)
        if profile is None or profile.find_exit(plan.depth) is None:
            return
        if self._watch is None or self._watch.plan != plan:
            self._watch = TrafficWatch(plan, profile, now, trusted=self._false_alarm != plan)
        self._watch.add(served, self._tuned, now)

    def evaluation_began(self, due: Evaluate, seen: Outlook) -> None:
        """Notes that an evaluation has begun."""
        self._evaluated_at = seen.finished
        self._retry_at = seen.now + _RETRY_SECONDS
        # Remembered, because a drift noticed during the evaluation is not answered by it.
        self._evaluated_for = Trigger.REASSESSMENT
        if due.fresh:
            self._evaluated_for = Trigger.DRIFT
        elif due.models:
            self._evaluated_for = Trigger.FOLLOW_UP

    def evaluation_ended(self, cpu_seconds: float, threads: int, *, failed: bool) -> None:
        """Notes that an evaluation has ended.

        `threads`: of all workers. A failed evaluation is tried again after a while.
        """
        self._allowance.spend(cpu_seconds, threads)
        if not failed:
            self._retry_at = -math.inf
        # A failed evaluation gives no basis for deciding on a drift.
        self._evaluation_has_ended = not failed or self._drift is None

    def decided(self, trigger: Trigger, decision: Decision, seen: Outlook) -> None:
        """Notes that a decision has been made and recorded."""
        settings = self._settings
        again = decision.again_after_requests
        if again is not None:
            self._dwell_over_at = seen.finished + again
        elif decision.moves or trigger is Trigger.DWELL or trigger in _FROM_EVALUATIONS:
            # Other decisions, such as the answer to a breach, do not consider what evaluations found before.
            self._dwell_over_at = None
        if trigger is Trigger.RETREAT and self._drift is not None:
            self._drift = replace(self._drift, retreated=True)
        if trigger not in _FROM_EVALUATIONS:
            return
        self._started, self._evaluation_has_ended = True, False
        # Profiles that someone else writes meanwhile count as a reassessment.
        self._evaluated_for = Trigger.REASSESSMENT
        if not seen.can_evaluate:
            self._evaluated_at = seen.finished
        self._decided_on = dict(seen.history_times)
        self._breaches_answered.clear()
        self._breach_due_at = None
        self.delayed_seconds = 0.0
        if trigger is Trigger.DRIFT:
            self._drift = self._watch = None
            self._false_alarm = None if decision.moves else decision.plan
            self._false_alarms = 0 if decision.moves else self._false_alarms + 1
            if self._false_alarms:
                self._quiet_until = seen.finished + settings.drift_requests * 2**self._false_alarms
        self._plan_follow_up(decision, seen, anew=trigger in (Trigger.START, Trigger.DRIFT))

    # -- what is due ------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether the first decision has been made."""
        return self._started

    @property
    def reading(self) -> Reading | None:
        """Nats of recent prompts under the plan in force.

        None: no prompt was read, or a drift has not been answered.
        """
        return None if self._watch is None or self._drift is not None else self._watch.reading

    def due(self, seen: Outlook) -> Due:
        """The next thing to do. None: nothing."""
        self._tune(seen)
        if not seen.history:
            may = seen.can_evaluate and not seen.evaluating and seen.now >= self._retry_at
            return Evaluate() if may else None
        if not self._started:
            return None if seen.evaluating else Decide(Trigger.START)
        if seen.routed:
            return None
        has_ended = self._evaluation_has_ended or seen.history_times != self._decided_on
        if has_ended and not seen.evaluating:
            return Decide(self._evaluated_for)
        answer = self._answer_drift(seen)
        if answer is not None or self._drift is not None:
            return answer
        if seen.evaluating:
            return self._answer_breach(seen)
        follow_up = self._follow_up
        # Not while workers move, because it would take CPU from their loading.
        may_follow_up = seen.can_evaluate and not seen.moving
        if follow_up is not None and seen.finished >= follow_up.due_at and may_follow_up:
            requests = min(follow_up.wait, self._settings.most_follow_up_requests)
            return Evaluate(follow_up.models, requests, prompts_only=True)
        if seen.finished >= self._evaluation_due_at and self._is_affordable(seen):
            return Evaluate() if seen.can_evaluate else Decide(Trigger.REASSESSMENT)
        if self._dwell_over_at is not None and seen.finished >= self._dwell_over_at:
            return Decide(Trigger.DWELL)
        return self._answer_breach(seen)

    def next_evaluation(self, seen: Outlook) -> str:
        """When candidates are evaluated again, as text."""
        if seen.evaluating:
            return "now"
        if self._follow_up is not None:
            left = max(0, self._follow_up.due_at - seen.finished)
            return (
                f"in {left} requests: {' and '.join(self._follow_up.models)}, where chance may have decided"
            )
        requests = self._evaluation_due_at - seen.finished
        wait = self._allowance.wait_seconds
        cap = f"so that profiling takes at most {self._settings.profiling_share:.1%} of the workers' CPU"
        if requests > 0:
            return f"in {requests} requests" + (f", and not within {wait:.0f} s, {cap}" if wait else "")
        return f"in {wait:.0f} s: it is due, and put off {cap}" if wait else "now"

    def _answer_drift(self, seen: Outlook) -> Due:
        """Evaluates a drift once enough of its requests have come. If that takes too long, retreats first."""
        settings = self._settings
        if settings.detection is Detection.WINDOW:
            return None
        if self._drift is None and self._watch is not None and seen.finished >= self._quiet_until:
            found = self._watch.alarm()
            if found is not None:
                side, since = found
                self._drift = _Drift(Moment(seen.finished, seen.now), since, side is Side.WORSE)
        drift = self._drift
        if drift is None:
            return None
        waited = seen.now - drift.noticed.seconds
        is_late = drift.is_worse and waited >= settings.drift_patience_seconds
        if is_late and not drift.retreated and not seen.moving:
            return Decide(Trigger.RETREAT)
        if seen.evaluating or not seen.can_evaluate or seen.now < self._retry_at:
            return None
        # Older requests belong to the traffic before the drift.
        recent = drift.began.requests + seen.finished - drift.noticed.requests
        if recent < settings.drift_requests:
            return None
        # The fewest requests that allow an immediate choice. Follow-ups evaluate more.
        age = seen.now - drift.began.seconds
        return Evaluate(requests=settings.drift_requests, fresh=True, newest_seconds=age, prompts_only=True)

    def _answer_breach(self, seen: Outlook) -> Due:
        """In window mode: the rule of the paper."""
        if self._settings.detection is not Detection.WINDOW or seen.moving:
            return None
        for view in seen.workers:
            if view.plan in self._breaches_answered or not is_breached(
                view, seen.history.get(view.model), self._settings
            ):
                continue
            self._breaches_answered.add(view.plan)
            # The answer uses measurements from before the traffic changed, so an evaluation must follow.
            self._breach_due_at = seen.finished + self._settings.breach_reassess_requests
            bar = Bar(
                model=view.model,
                depth=view.depth,
                time=max(seen.history_times.values()),
                reason=f"confidence breach: {view.window_high_exit_tokens} of the last "
                f"{view.window_tokens} tokens were unsure",
                shallower=True,
            )
            return Decide(Trigger.BREACH, bar)
        return None

    @property
    def _evaluation_due_at(self) -> int:
        """The count of finished requests at which all candidates are evaluated again."""
        # If the controller has not evaluated yet, its profiles may be old, so an evaluation is due at once.
        regular = 0 if self._evaluated_at is None else self._evaluated_at + self._settings.reassess_requests
        return regular if self._breach_due_at is None else min(regular, self._breach_due_at)

    def _is_affordable(self, seen: Outlook) -> bool:
        """Whether the reassessment that is due may begin. It is urgent after a breach."""
        if not seen.can_evaluate:
            return True
        urgent = self._breach_due_at is not None and seen.finished >= self._breach_due_at
        if not self._allowance.permits(urgent=urgent):
            self._delayed_since = self._delayed_since or seen.now
            return False
        self.delayed_seconds = 0.0 if self._delayed_since is None else seen.now - self._delayed_since
        self._delayed_since = None
        return True

    def _tune(self, seen: Outlook) -> None:
        """Tunes the tests to the request rate, because false alarms are limited per day."""
        if self._began is None:
            self._began = Moment(seen.finished, seen.now)
        seconds, requests = seen.now - self._began.seconds, seen.finished - self._began.requests
        rate = requests / seconds if seconds > 0 else 0.0
        wanted = rate * _SECONDS_PER_DAY / self._settings.false_alarms_per_day * _TESTS
        wanted = max(_FEWEST_BETWEEN_ALARMS, min(_MOST_BETWEEN_ALARMS, wanted))
        if not 1 / _RETUNE_FACTOR < wanted / self._between_alarms < _RETUNE_FACTOR:
            self._between_alarms = wanted
            self._tuned = tunings(wanted, self._settings.drift_delay_requests)

    def _plan_follow_up(self, decision: Decision, seen: Outlook, *, anew: bool) -> None:
        """Plans an evaluation of more requests while chance may have decided. The wait doubles each time."""
        before, self._follow_up = self._follow_up, None
        if decision.undecided:
            wait = 2 * before.wait if before is not None and not anew else self._settings.follow_up_requests
            self._follow_up = _FollowUp(seen.finished + wait, wait, decision.undecided)


@dataclass(frozen=True, slots=True)
class _FollowUp:
    # The count of finished requests at which it is due, and the number of requests waited for.
    due_at: int
    wait: int
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Drift:
    noticed: Moment
    # When the drift began. `requests` counts those from then until the drift was noticed.
    began: Moment
    is_worse: bool
    # Whether workers have been sent to the safest known plan.
    retreated: bool = False
