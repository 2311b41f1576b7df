"""The agenda: when the controller evaluates and decides."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from helios.history import ModelProfile, RequestSample
from helios.served import ServedPlan
from helios.slo import Slo
from services.controller.agenda import Agenda, AgendaSettings, Decide, Due, Evaluate, Outlook
from services.controller.allowance import Allowance
from services.controller.decision import Decision
from services.controller.policy.decide import decide
from services.controller.situation import Situation, Trigger, WorkerView
from services.controller.traffic_watch import Served
from tests.profiles import exit_profile, model_profile

PLAN = ServedPlan(model="small", depth=4)


def profile(name: str = "small", time: float = 1.0, rise: float = 0.01) -> ModelProfile:
    """Exits 4 and 6 (the last layer). Exit 4 is `rise` nats per byte worse. Twelve equal requests."""
    samples = tuple(
        RequestSample(id=str(number), text_bytes=1000, nats=((0.9 + rise) * 1000, 900.0 + number % 2))
        for number in range(12)
    )
    exits = [exit_profile(4, 0.9 + rise), exit_profile(6, 0.9)]
    return model_profile(name, exits).model_copy(update={"time": time, "samples": samples})


class Owner:
    """Does what the agenda says, like the controller. The test decides when an evaluation ends."""

    def __init__(
        self, *, profiler: bool = True, history: Mapping[str, ModelProfile] | None = None, **fields: object
    ) -> None:
        self.now = self.finished = 0.0
        self.settings = AgendaSettings.model_validate(fields)
        self.agenda = Agenda(self.settings, Allowance(self.settings.profiling_share, lambda: self.now))
        self.history = dict(history or {})
        self.profiler = profiler
        self.evaluating = self.moving = False
        self.evaluated: list[Evaluate] = []
        self.decided: list[Trigger] = []
        self.plan = PLAN

    @property
    def seen(self) -> Outlook:
        view = WorkerView(
            worker_id="w", model=self.plan.model, depth=self.plan.depth, tokenizer_id="t", max_running=8
        )
        times = {name: one.time for name, one in self.history.items()}
        return Outlook(
            self.now,
            int(self.finished),
            [view],
            self.history,
            times,
            self.profiler,
            self.evaluating,
            self.moving,
        )

    def look(self) -> Due:
        """Asks the agenda once, and does what is due."""
        due = self.agenda.due(self.seen)
        if isinstance(due, Evaluate):
            self.evaluated.append(due)
            self.evaluating = True
            self.agenda.evaluation_began(due, self.seen)
        elif isinstance(due, Decide):
            self.decided.append(due.trigger)
            situation = Situation(
                trigger=due.trigger,
                slo=Slo(),
                history=self.history,
                candidates=tuple(self.history),
                workers=tuple(self.seen.workers),
                plan=self.plan,
                prompt_tokens=64,
                output_tokens=64,
            )
            decision: Decision = decide(situation, self.settings)
            self.plan = decision.plan or self.plan
            self.agenda.decided(due.trigger, decision, self.seen)
        return due

    def settle(self) -> None:
        """Asks until nothing is due."""
        while self.look() is not None:
            pass

    def end(self, *profiles: ModelProfile, failed: bool = False, cpu_seconds: float = 0.0) -> None:
        self.evaluating = False
        self.history |= {one.model: one for one in profiles}
        self.agenda.evaluation_ended(cpu_seconds, 1, failed=failed)

    def serve(self, requests: int, *, confidence_nats: float, prompt_nats: float) -> None:
        """Serves requests of 64 tokens, one every tenth of a second, with these nats per token."""
        for _ in range(requests):
            self.now += 0.1
            self.finished += 1
            served = Served(self.plan, 1, 64, 64 * confidence_nats, 1, 4, 4 * prompt_nats)
            self.agenda.observe(served, self.history, self.now)


def started(**fields: object) -> Owner:
    """An owner that has decided and has nothing left to do."""
    owner = Owner(history={"small": profile()}, decide_sigmas=0, **fields)
    owner.settle()
    if owner.evaluating:
        owner.end(profile(time=2.0))
        owner.settle()
    assert owner.plan == PLAN
    owner.decided.clear()
    owner.evaluated.clear()
    return owner


def usual(owner: Owner) -> dict[str, float]:
    """The figures that the profile expects of traffic under the plan."""
    one = owner.history["small"].at(4)
    return {"confidence_nats": one.confidence_nats[0], "prompt_nats": one.nats_per_byte * 4}


def test_without_a_history_the_profiler_is_asked_and_asked_again_after_a_while() -> None:
    owner = Owner()
    assert isinstance(owner.look(), Evaluate)
    owner.end(failed=True)
    assert owner.look() is None
    owner.now += 20
    assert isinstance(owner.look(), Evaluate)
    owner.end(profile())
    owner.look()
    assert owner.decided == [Trigger.START]


def test_an_old_history_is_decided_on_at_once_and_measured_anew() -> None:
    owner = Owner(history={"small": profile()})
    assert owner.look() == Decide(Trigger.START)
    assert owner.look() == Evaluate()


def test_without_a_profiler_there_is_a_decision_each_interval_and_no_more() -> None:
    owner = Owner(profiler=False, history={"small": profile()}, reassess_requests=10)
    for _ in range(30):
        owner.settle()
        owner.finished += 1
    assert owner.decided == [Trigger.START, Trigger.REASSESSMENT, Trigger.REASSESSMENT]


def test_usual_traffic_is_no_drift() -> None:
    owner = started(reassess_requests=10_000)
    owner.serve(500, **usual(owner))
    assert owner.look() is None


@pytest.mark.parametrize("figure", ["confidence_nats", "prompt_nats"])
@pytest.mark.parametrize("change", [-0.75, 3.0])
def test_a_drift_is_evaluated_at_once_on_its_own_requests(figure: str, change: float) -> None:
    owner = started(reassess_requests=10_000, profiling_share=1e-9)
    owner.serve(60, **usual(owner))
    assert owner.look() is None
    before = owner.now
    drifted = usual(owner)
    drifted[figure] *= 1 + change
    for _ in range(60):
        owner.serve(1, **drifted)
        if (due := owner.look()) is not None:
            break
    assert isinstance(due, Evaluate)
    assert due.fresh
    assert due.newest_seconds is not None
    # The evaluation takes requests since the drift began, give or take one.
    assert owner.now - due.newest_seconds == pytest.approx(before, abs=0.25)
    assert due.requests == owner.settings.drift_requests
    owner.end(profile(time=3.0))
    owner.settle()
    assert owner.decided == [Trigger.DRIFT]


def doubtful(time: float) -> ModelProfile:
    """A profile of two requests that differ. By their mean, exit 4 is a little within the bound."""
    samples = (
        RequestSample(id="a", text_bytes=1000, nats=(890.0, 900.0)),
        RequestSample(id="b", text_bytes=1000, nats=(934.0, 900.0)),
    )
    return profile(rise=0.012, time=time).model_copy(update={"samples": samples})


def drift(owner: Owner) -> None:
    owner.serve(60, **usual(owner))
    owner.serve(
        15, confidence_nats=usual(owner)["confidence_nats"] * 5, prompt_nats=usual(owner)["prompt_nats"] * 3
    )


def test_workers_go_to_the_safest_plan_when_the_evaluation_takes_too_long() -> None:
    owner = started(reassess_requests=10_000)
    drift(owner)
    assert isinstance(owner.look(), Evaluate)
    owner.now += 4
    assert owner.look() is None
    owner.now += 2
    assert owner.look() == Decide(Trigger.RETREAT)
    assert owner.plan == ServedPlan(model="small", depth=6)
    assert owner.look() is None
    owner.end(profile(time=3.0))
    owner.settle()
    assert owner.decided == [Trigger.RETREAT, Trigger.DRIFT]
    assert owner.plan == PLAN


def test_a_drift_whose_evaluation_failed_is_evaluated_again_after_a_while() -> None:
    owner = started(reassess_requests=10_000, drift_patience_seconds=1e6)
    drift(owner)
    assert isinstance(owner.look(), Evaluate)
    owner.end(failed=True)
    assert owner.look() is None
    owner.now += 20
    again = owner.look()
    assert isinstance(again, Evaluate)
    assert again.fresh
    assert owner.decided == []


def followed_up(**fields: object) -> Owner:
    """An owner whose first decision may rest on chance, so that more requests will be evaluated."""
    owner = Owner(history={"small": profile(rise=0.012)}, reassess_requests=10_000, **fields)
    owner.settle()
    owner.end(doubtful(3.0))
    owner.settle()
    return owner


def test_an_evaluation_that_began_before_a_drift_is_no_answer_to_it() -> None:
    """The traffic changes while a follow-up of one model is being evaluated."""
    owner = followed_up(follow_up_requests=60)
    owner.serve(60, **usual(owner))
    assert owner.look() == Evaluate(("small",), 12, prompts_only=True)
    drift(owner)
    assert owner.look() is None
    owner.end(doubtful(4.0))
    assert owner.look() == Decide(Trigger.FOLLOW_UP)
    due = owner.look()
    assert isinstance(due, Evaluate)
    assert due.fresh
    owner.end(profile(time=5.0))
    assert owner.look() == Decide(Trigger.DRIFT)


def test_no_follow_up_is_evaluated_while_workers_are_on_their_way() -> None:
    owner = followed_up(follow_up_requests=10)
    owner.serve(10, **usual(owner))
    owner.moving = True
    assert owner.look() is None
    owner.moving = False
    assert owner.look() == Evaluate(("small",), 10, prompts_only=True)


def test_a_breach_does_not_make_it_forget_when_a_dwell_is_over() -> None:
    owner = started(reassess_requests=10_000)

    def decide(trigger: Trigger, again: int | None) -> None:
        kept = Decision(
            trigger=trigger,
            before=owner.plan,
            plan=owner.plan,
            chosen=(),
            options=(),
            reason="",
            again_after_requests=again,
        )
        owner.agenda.decided(trigger, kept, owner.seen)

    owner.settle()
    decide(Trigger.REASSESSMENT, 8)
    decide(Trigger.BREACH, None)
    owner.finished += 8
    assert owner.look() == Decide(Trigger.DWELL)
    decide(Trigger.REASSESSMENT, 8)
    decide(Trigger.REASSESSMENT, None)
    owner.finished += 8
    assert owner.look() is None


def test_nothing_else_is_evaluated_while_a_drift_waits_for_its_requests() -> None:
    # The follow-up is due at the same time.
    owner = followed_up(follow_up_requests=75, drift_requests=100, drift_patience_seconds=1e6)
    drift(owner)
    assert owner.look() is None
    owner.serve(100, **usual(owner))
    due = owner.look()
    assert isinstance(due, Evaluate)
    assert due.fresh


def test_a_false_alarm_does_not_come_again_at_once() -> None:
    """The model is always more confident on generated text than the profile expects."""
    owner = started(reassess_requests=10_000)
    surer = usual(owner) | {"confidence_nats": 0.2 * usual(owner)["confidence_nats"]}
    evaluations = 0
    for _ in range(400):
        owner.serve(1, **surer)
        owner.settle()
        if owner.evaluating:
            evaluations += 1
            owner.end(profile(time=3.0 + evaluations))
            owner.settle()
    assert evaluations <= 2


def test_chance_is_followed_up_after_twice_as_many_requests_each_time() -> None:
    """The exit is a little within the bound, but the two requests differ."""
    owner = Owner(history={"small": profile(rise=0.012)}, reassess_requests=10_000, follow_up_requests=3)
    at: list[int] = []
    for _ in range(60):
        owner.settle()
        if owner.evaluating:
            at.append(int(owner.finished))
            owner.end(doubtful(10.0 + len(at)))
            owner.settle()
        owner.finished += 1
    follow_ups = [due for due in owner.evaluated if due.models]
    assert [due.requests for due in follow_ups[:4]] == [3, 6, 12, 12]
    assert all(due.models == ("small",) and due.prompts_only for due in follow_ups)
    assert at[:5] == [0, 3, 9, 21, 45]
    assert Trigger.FOLLOW_UP in owner.decided


def test_regular_evaluations_are_put_off_for_their_share_of_cpu() -> None:
    owner = started(reassess_requests=10, profiling_share=0.01)
    owner.finished += 10
    owner.settle()
    owner.end(profile(time=3.0), cpu_seconds=1.0)
    owner.settle()
    owner.finished += 20
    assert owner.look() is None
    assert "put off" in owner.agenda.next_evaluation(owner.seen)
    owner.now += 101
    assert owner.look() == Evaluate()


def test_in_window_mode_only_the_papers_rule_counts() -> None:
    owner = started(detection="window", reassess_requests=10_000)
    drift(owner)
    assert owner.look() is None
    unsure = replace(
        owner.seen,
        workers=[
            owner.seen.workers[0].model_copy(update={"window_tokens": 100, "window_high_exit_tokens": 80})
        ],
    )
    due = owner.agenda.due(unsure)
    assert isinstance(due, Decide)
    assert due.trigger is Trigger.BREACH
    assert owner.agenda.due(unsure) is None


def test_what_is_read_of_prompts_goes_into_decisions_but_not_across_a_drift() -> None:
    owner = started(reassess_requests=10_000)
    owner.serve(60, **usual(owner))
    reading = owner.agenda.reading
    assert reading is not None
    assert (reading.model, reading.depth) == (PLAN.model, PLAN.depth)
    assert reading.nats_per_token == pytest.approx(usual(owner)["prompt_nats"])
    drift(owner)
    owner.look()
    assert owner.agenda.reading is None
