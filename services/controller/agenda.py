"""What the controller is to do now: pure, no IO and no clock of its own.

The service and the simulator of `helios bench paper` ask the same agenda, so what is simulated is what is served.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from pydantic import Field

from helios.history import ModelProfile
from services.controller.allowance import Allowance
from services.controller.cusum import Cusum, Moment, Tuning
from services.controller.decision import Decision
from services.controller.policy import PolicySettings, is_breached
from services.controller.situation import Bar, Plan, Reading, Trigger, WorkerView

# Requests that a profile's expectation counts as at most, until served requests refine it. Generated text differs
# from the prompts that were profiled, so what its confidences are expected to be is the less certain.
_PROMPT_WEIGHT, _CONFIDENCE_WEIGHT = 25.0, 5.0
# How much more the confidences of a request vary than if its tokens were independent (Kish's design effect).
_CLUSTERING = 2.0
# Generated tokens whose confidences count as one observation.
_BLOCK_TOKENS = 32
# Prompts after which a reading counts a third of what the newest do.
_READING_PROMPTS = 100.0
# Figures that are tested, two sides each.
_TESTS = 4
_SECONDS_PER_DAY = 86400.0
# Bounds of what the false alarms asked for come to in requests.
_FEWEST_BETWEEN_ALARMS, _MOST_BETWEEN_ALARMS = 1e3, 1e8
# Between two attempts to get a first history, and to reach a profiler after an alarm.
_RETRY_SECONDS = 10.0


class Detection(enum.StrEnum):
    """How a drift of the traffic is noticed."""

    SEQUENTIAL = "sequential"
    WINDOW = "window"


class AgendaSettings(PolicySettings):
    """What an operator can set about when something is decided."""

    detection: Detection = Field(
        Detection.SEQUENTIAL,
        description="how a drift is noticed: sequential (a CUSUM test over what prompts and tokens say) or window "
        "(the paper's rule: breach_limit unsure tokens in window_tokens)",
    )
    false_alarms_per_day: float = Field(
        24.0, gt=0, description="drifts that are noticed by mistake in a day; each costs an evaluation"
    )
    drift_delay_requests: float = Field(
        20.0,
        ge=2,
        description="requests after which the smallest drift that is told from chance is noticed, on the mean; "
        "larger ones are noticed sooner. More: smaller ones are told from chance",
    )
    drift_patience_seconds: float = Field(
        5.0,
        ge=0,
        description="after a drift is noticed, time for its evaluation before workers go to the safest plan known",
    )
    drift_requests: int = Field(
        4, ge=2, description="requests since a drift began that there must be before it is evaluated"
    )
    follow_up_requests: int = Field(
        6,
        ge=1,
        description="requests that are evaluated at a drift, and after which more are, while undecided",
    )
    breach_reassess_requests: int = Field(
        5,
        ge=1,
        description="requests after a breach of the window until the candidates are evaluated on the new traffic",
    )
    profiling_share: float = Field(
        0.005,
        gt=0,
        le=1,
        description="CPU that profiling may take while nothing is at stake, a share of the workers' threads: regular "
        "reassessments are put off for it, those after a drift are not; 1: never",
    )


@dataclass(frozen=True, slots=True)
class Served:
    """What was served under one plan since the agenda was told last. All are counts but the nats."""

    plan: Plan
    requests: int = 0
    tokens: int = 0
    """Generated tokens whose confidences are known."""
    confidence_nats: float = 0.0
    """Sum of the negative logarithms of the generated tokens' confidences."""
    prompts_read: int = 0
    prompt_tokens_read: int = 0
    prompt_nats: float = 0.0

    def plus(self, other: "Served") -> "Served":
        """Both together."""
        return Served(
            self.plan,
            self.requests + other.requests,
            self.tokens + other.tokens,
            self.confidence_nats + other.confidence_nats,
            self.prompts_read + other.prompts_read,
            self.prompt_tokens_read + other.prompt_tokens_read,
            self.prompt_nats + other.prompt_nats,
        )


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Have the profiler evaluate candidates on recent requests."""

    models: tuple[str, ...] = ()
    """Empty: all candidates."""
    requests: int | None = None
    """None: as many as the profiler takes."""
    fresh: bool = False
    """Whether the traffic has changed: earlier evaluations do not count any more, and this one is urgent."""
    newest_seconds: float | None = None
    """Age of the oldest request that is evaluated; None: any."""


@dataclass(frozen=True, slots=True)
class Decide:
    """Ask the policy."""

    trigger: Trigger
    bar: Bar | None = None


Due: TypeAlias = Evaluate | Decide | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the agenda looks at. `workers` are those that no operator holds."""

    now: float
    """Seconds, on any clock that goes forward."""
    finished: int
    """Requests, since the controller began to watch."""
    workers: Sequence[WorkerView]
    history: Mapping[str, ModelProfile]
    history_times: Mapping[str, float]
    can_evaluate: bool
    evaluating: bool
    moving: bool
    """Whether workers are on their way to a plan, or cannot get there."""


class Agenda:
    """When to evaluate and when to decide. Its owner does both, and tells it."""

    def __init__(self, settings: AgendaSettings, allowance: Allowance) -> None:
        self._settings = settings
        self._allowance = allowance
        self._started = False
        self._began: tuple[float, int] | None = None
        self._between_alarms = _FEWEST_BETWEEN_ALARMS
        # How the tests are set, by the settings and the rate of requests.
        self.tuning = Tuning.of(self._between_alarms, settings.drift_delay_requests)
        # Finished requests at the last evaluation; None: there was none.
        self._evaluated_at: int | None = None
        self._decided_on: Mapping[str, float] = {}
        self._retry_at = -math.inf
        # Of the plan that is served; None until there is a profile to expect anything of.
        self._tests: _Tests | None = None
        # When a drift was noticed that has not been answered from an evaluation yet.
        self._alarm: _Alarm | None = None
        # The plan that was kept when a drift was noticed last; None: another was chosen.
        self._false_alarm: Plan | None = None
        # Finished requests at which undecided models are evaluated again, and on how many; None: all is decided.
        self._follow_up: _FollowUp | None = None
        # In window mode: finished requests at which a breach asks for an evaluation.
        self._breach_due_at: int | None = None
        self._breaches_answered: set[Plan] = set()
        # Finished requests at which the dwell ends that kept a better plan out; None: none was.
        self._dwell_over_at: int | None = None
        # Since when a reassessment is put off; and for how long the last one was.
        self._delayed_since: float | None = None
        self.delayed_seconds = 0.0

    # -- what happens -----------------------------------------------------------------------------

    def observe(self, served: Served, history: Mapping[str, ModelProfile], now: float) -> None:
        """Takes in what was served until now, seconds."""
        profile = history.get(served.plan.model)
        known = profile is not None and any(one.depth == served.plan.depth for one in profile.exits)
        if profile is None or not known:
            return
        if self._tests is None or self._tests.plan != served.plan:
            # A drift that changed nothing was none: then the profile's expectation is what is wrong.
            self._tests = _Tests(served.plan, profile, now, trusted=self._false_alarm != served.plan)
        self._tests.add(served, self.tuning, now)

    @property
    def reading(self) -> Reading | None:
        """What recent prompts gave under the plan that is served; None: nothing was read since the last drift."""
        return None if self._tests is None or self._alarm is not None else self._tests.reading

    def due(self, seen: Outlook) -> Due:
        """What is to be done now, if anything."""
        if self._began is None:
            self._began = (seen.now, seen.finished)
        self._note_rate(seen)
        if not seen.history:
            return self._first_evaluation(seen)
        if not self._started:
            return Decide(Trigger.START) if not seen.evaluating else None
        if not seen.evaluating and seen.history_times != self._decided_on:
            return Decide(Trigger.DRIFT if self._alarm is not None else Trigger.REASSESSMENT)
        if (drift := self._answer_drift(seen)) is not None:
            return drift
        if seen.evaluating:
            return self._answer_breach(seen)
        if self._follow_up is not None and seen.finished >= self._follow_up.at and seen.can_evaluate:
            return Evaluate(self._follow_up.models, self._follow_up.requests)
        if seen.finished >= self._evaluation_due_at and self._is_affordable(seen):
            return Evaluate() if seen.can_evaluate else Decide(Trigger.REASSESSMENT)
        if self._dwell_over_at is not None and seen.finished >= self._dwell_over_at:
            return Decide(Trigger.DWELL)
        return self._answer_breach(seen)

    def evaluation_began(self, seen: Outlook) -> None:
        """An evaluation is under way."""
        self._evaluated_at = seen.finished
        self._retry_at = seen.now + _RETRY_SECONDS
        self._breach_due_at = None
        self._follow_up = None if self._follow_up is None else replace(self._follow_up, at=math.inf)

    def evaluation_ended(self, cpu_seconds: float, threads: int, *, failed: bool) -> None:
        """What it cost. One that failed is tried again after a while."""
        self._allowance.spend(cpu_seconds, threads)
        if not failed:
            self._retry_at = -math.inf

    def decided(self, trigger: Trigger, decision: Decision, seen: Outlook) -> None:
        """A decision has been made and recorded."""
        again = decision.again_after_requests
        self._dwell_over_at = None if again is None else seen.finished + again
        if trigger is Trigger.RETREAT and self._alarm is not None:
            self._alarm = replace(self._alarm, retreated=True)
        if trigger in (Trigger.START, Trigger.REASSESSMENT, Trigger.DRIFT):
            if trigger is not Trigger.REASSESSMENT:
                self._follow_up = None
            self._started = True
            self._decided_on = dict(seen.history_times)
            self._breaches_answered.clear()
            self.delayed_seconds = 0.0
            self._plan_follow_up(decision, seen)
        if trigger is Trigger.DRIFT:
            self._alarm = None
            self._tests = None
            self._false_alarm = None if decision.moves else decision.plan

    # -- what is due ------------------------------------------------------------------------------

    def _first_evaluation(self, seen: Outlook) -> Due:
        if seen.evaluating or not seen.can_evaluate or seen.now < self._retry_at:
            return None
        return Evaluate()

    def _answer_drift(self, seen: Outlook) -> Due:
        tests, settings = self._tests, self._settings
        if settings.detection is Detection.WINDOW or tests is None:
            return None
        if self._alarm is None and (found := tests.alarm(self.tuning.limit)) is not None:
            side, since = found
            self._alarm = _Alarm(seen.now, seen.finished, side is _Side.WORSE, since)
        alarm = self._alarm
        if alarm is None:
            return None
        waited = seen.now - alarm.since
        is_late = alarm.is_worse and waited >= settings.drift_patience_seconds
        if is_late and not alarm.retreated and not seen.moving:
            return Decide(Trigger.RETREAT)
        if seen.evaluating or not seen.can_evaluate or seen.now < self._retry_at:
            return None
        # Older requests are of the traffic before; and a handful of the new ones has to be there.
        recent = alarm.began.requests + seen.finished - alarm.noticed_at
        if recent < settings.drift_requests:
            return None
        count = min(recent, settings.follow_up_requests)
        return Evaluate(requests=count, fresh=True, newest_seconds=seen.now - alarm.began.seconds)

    def _answer_breach(self, seen: Outlook) -> Due:
        """The paper's rule, in window mode."""
        if self._settings.detection is not Detection.WINDOW or seen.moving:
            return None
        for view in seen.workers:
            if view.plan in self._breaches_answered:
                continue
            if is_breached(view, seen.history.get(view.model), self._settings):
                self._breaches_answered.add(view.plan)
                # The breach is answered from what was measured before the traffic changed.
                self._breach_due_at = seen.finished + self._settings.breach_reassess_requests
                reason = (
                    f"confidence breach: {view.window_high_exit_tokens} of the last {view.window_tokens} tokens "
                    "were unsure"
                )
                newest = max((profile.time for profile in seen.history.values()), default=0.0)
                bar = Bar(model=view.model, depth=view.depth, time=newest, reason=reason, shallower=True)
                return Decide(Trigger.BREACH, bar)
        return None

    @property
    def _evaluation_due_at(self) -> int:
        """Finished requests at which the candidates are evaluated again."""
        # What an earlier controller went by may be old.
        regular = 0 if self._evaluated_at is None else self._evaluated_at + self._settings.reassess_requests
        return regular if self._breach_due_at is None else min(regular, self._breach_due_at)

    def _is_affordable(self, seen: Outlook) -> bool:
        """Whether the reassessment that is due may begin; after a breach it goes first."""
        if not seen.can_evaluate:
            return True
        urgent = self._breach_due_at is not None and seen.finished >= self._breach_due_at
        if not self._allowance.permits(urgent=urgent):
            self._delayed_since = self._delayed_since or seen.now
            return False
        self.delayed_seconds = 0.0 if self._delayed_since is None else seen.now - self._delayed_since
        self._delayed_since = None
        return True

    def next_evaluation(self, seen: Outlook) -> str:
        """When candidates are evaluated again, in words."""
        if seen.evaluating:
            return "now"
        if self._follow_up is not None and math.isfinite(self._follow_up.at):
            left = max(0, round(self._follow_up.at - seen.finished))
            return f"in {left} requests: {' and '.join(self._follow_up.models)}, on which the choice hangs"
        requests = self._evaluation_due_at - seen.finished
        wait = self._allowance.wait_seconds
        cap = f"so that profiling takes at most {self._settings.profiling_share:.1%} of the workers' CPU"
        if requests > 0:
            return f"in {requests} requests" + (f", and not within {wait:.0f} s, {cap}" if wait else "")
        return f"in {wait:.0f} s: it is due, and put off {cap}" if wait else "now"

    # -- inside -----------------------------------------------------------------------------------

    def _note_rate(self, seen: Outlook) -> None:
        assert self._began is not None
        seconds, requests = seen.now - self._began[0], seen.finished - self._began[1]
        rate = requests / seconds if seconds > 0 else 0.0
        wanted = rate * _SECONDS_PER_DAY / self._settings.false_alarms_per_day * _TESTS
        wanted = max(_FEWEST_BETWEEN_ALARMS, min(_MOST_BETWEEN_ALARMS, wanted))
        # What hangs on its logarithm need not follow every request.
        if not 0.8 < wanted / self._between_alarms < 1.25:
            self._between_alarms = wanted
            self.tuning = Tuning.of(wanted, self._settings.drift_delay_requests)

    def _plan_follow_up(self, decision: Decision, seen: Outlook) -> None:
        """More requests are evaluated while chance may decide: each time twice as many requests later."""
        if not decision.undecided:
            self._follow_up = None
            return
        wait = self._settings.follow_up_requests if self._follow_up is None else 2 * self._follow_up.wait
        self._follow_up = _FollowUp(
            seen.finished + wait, wait, decision.undecided, self._settings.follow_up_requests
        )


@dataclass(frozen=True, slots=True)
class _FollowUp:
    at: float
    wait: int
    models: tuple[str, ...]
    requests: int


class _Side(enum.Enum):
    WORSE = "worse"
    BETTER = "better"

    def is_reached(self, test: Cusum, limit: float) -> bool:
        return test.has_risen(limit) if self is _Side.WORSE else test.has_fallen(limit)


@dataclass(frozen=True, slots=True)
class _Alarm:
    since: float
    # Finished requests when it was noticed.
    noticed_at: int
    is_worse: bool
    # Finished requests between the change and that, and when the change was.
    began: Moment
    retreated: bool = False


class _Tests:
    """Whether what is served under a plan is what its profile expects."""

    def __init__(self, plan: Plan, profile: ModelProfile, now: float, *, trusted: bool) -> None:
        self.plan = plan
        # When what was taken in last ended.
        self._last = Moment(0, now)
        self._prompts_deviation = self._reading_mean = self._reading_weight = self._reading_squares = 0.0
        one = profile.at(plan.depth)
        index = profile.exits.index(one)
        per_token = [
            sample.nats[index] / sample.text_bytes * profile.bytes_per_token
            for sample in profile.samples
            if sample.text_bytes
        ]
        self._prompts_mean = math.log(one.perplexity)
        mean = self._prompts_mean
        count = len(per_token)
        self._between = sum((value - mean) ** 2 for value in per_token) / count if count > 1 else mean**2 / 4
        self._prompt_weight = min(max(count, 2), _PROMPT_WEIGHT) if trusted else 1.0
        self._prompts: Cusum | None = None
        mean, deviation = one.confidence_nats
        deviation *= math.sqrt(_CLUSTERING / _BLOCK_TOKENS)
        self._confidences = Cusum(mean, deviation, _CONFIDENCE_WEIGHT if trusted else 1.0)

    def add(self, served: Served, tuning: Tuning, now: float) -> None:
        if served.prompts_read and served.prompt_tokens_read:
            if self._prompts is None:
                # The nats of single tokens vary about as much as their mean is large.
                tokens = served.prompt_tokens_read / served.prompts_read
                self._prompts_deviation = math.sqrt(self._between + self._prompts_mean**2 / tokens)
                self._prompts = Cusum(self._prompts_mean, self._prompts_deviation, self._prompt_weight)
            mean = served.prompt_nats / served.prompt_tokens_read
            self._read(mean, served.prompts_read)
            self._prompts.add(mean, served.prompts_read, tuning, self._last)
        if served.tokens:
            mean, blocks = served.confidence_nats / served.tokens, served.tokens / _BLOCK_TOKENS
            self._confidences.add(mean, blocks, tuning, self._last)
        self._last = Moment(self._last.requests + served.requests, now)

    def _read(self, mean: float, prompts: int) -> None:
        """Takes in the mean of some prompts; those of long ago count less and less."""
        fade = math.exp(-prompts / _READING_PROMPTS)
        before = self._reading_weight * fade
        self._reading_weight = before + prompts
        self._reading_squares = self._reading_squares * fade**2 + prompts
        self._reading_mean += (mean - self._reading_mean) * prompts / self._reading_weight

    @property
    def reading(self) -> Reading | None:
        if not self._reading_weight:
            return None
        error = self._prompts_deviation * math.sqrt(self._reading_squares) / self._reading_weight
        return Reading(
            model=self.plan.model, depth=self.plan.depth, nats_per_token=self._reading_mean, error=error
        )

    def alarm(self, limit: float) -> tuple[_Side, Moment] | None:
        """Which way the traffic has changed; the requests that were finished since, and when that began."""
        tests = [test for test in (self._confidences, self._prompts) if test is not None]
        for side in _Side:
            found = [test for test in tests if side.is_reached(test, limit)]
            if found:
                began = min(test.began for test in found)
                return side, Moment(self._last.requests - began.requests, began.seconds)
        return None
