"""Sets of plans: what memory holds, which set is chosen, and when a single plan is better. All pure."""

import math
from collections.abc import Sequence

import pytest

from helios.history import DecodeSpeed, ModelProfile
from helios.orders import EVERY_WORKER
from helios.routing.knowledge import Knowledge
from helios.routing.terms import Recent
from helios.served import ServedPlan
from helios.slo import Objective, Slo
from services.controller.policy.decide import decide
from services.controller.policy.sets import union, with_first
from services.controller.policy.settings import PolicySettings
from services.controller.routing.costs import head_seconds, plan_cost, probe_cost, quickest_within
from services.controller.routing.expectation import Demand
from services.controller.routing.offer import Answer, Question, find_sets, why_single
from services.controller.routing.plan_sets import Layout, choose_set, layouts_of
from services.controller.situation import Bar, SetOffer, Situation, Trigger, WorkerView
from tests.profiles import exit_profile, model_profile
from tests.routing_examples import DEPTHS, MODELS, examples, recent

PROSE = model_profile("prose", [exit_profile(depth, 0.9) for depth in DEPTHS])
TECH = model_profile("tech", [exit_profile(depth, 0.9) for depth in DEPTHS])
SETTINGS = PolicySettings(min_gain=0.05, min_dwell_requests=25, routing_premium=0.03)
SIX = ServedPlan(model="prose", depth=6)
# The weights of an exit are 1 MB a layer, its KV 0.5 kB a layer and token. A mean request has 100 tokens.
MB = 1_000_000


def worker(name: str = "a", megabytes: float | None = None, **fields: object) -> WorkerView:
    memory = None if megabytes is None else int(megabytes * MB)
    values = {"worker_id": name, "model": "prose", "depth": 12, "tokenizer_id": "t", "max_running": 64}
    return WorkerView.model_validate(values | {"memory_bytes": memory} | fields)


def plans(*models: str, depths: Sequence[int] = DEPTHS) -> frozenset[ServedPlan]:
    return frozenset(ServedPlan(model=model, depth=depth) for model in models for depth in depths)


def layouts(*workers: WorkerView, **fields: object) -> list[Layout]:
    return layouts_of([PROSE, TECH], workers, 60, 80, **fields)  # type: ignore[arg-type]


# -- what memory holds ------------------------------------------------------------------------------------


def test_all_exits_of_all_models_are_in_one_set_where_memory_holds_it() -> None:
    first = layouts(worker(), worker("b", 100))[0]
    assert set(first.plans) == {EVERY_WORKER}
    assert first.union == plans(*MODELS)
    assert (first.batch, first.is_short) == (64, False)


def test_the_batch_is_what_weights_to_the_deepest_plan_leave_for_kv_of_the_mean_depth() -> None:
    first = layouts(worker(megabytes=24 + 3.5))[0]
    kv = 512 * (2 + 6 + 12) / 3 * 100
    assert first.union == plans(*MODELS)
    assert first.batch == int(3.5 * MB / kv)
    assert first.is_short


def test_a_model_that_does_not_fit_leaves_the_set() -> None:
    found = layouts(worker(megabytes=20))
    assert [one.union for one in found] == [plans("prose"), plans("tech")]
    assert not layouts(worker(megabytes=11)), "no model fits with all of its layers"


def test_workers_of_different_memory_get_what_each_holds() -> None:
    first = layouts(worker("a", 100), worker("b", 100), worker("c", 20))[0]
    assert set(first.plans[EVERY_WORKER]) == plans(*MODELS)
    assert len({one.model for one in first.plans["c"]}) == 1
    assert first.is_short


def test_workers_that_hold_one_model_each_cover_all_models_together() -> None:
    first = layouts(worker("a", 20), worker("b", 20))[0]
    assert first.union == plans(*MODELS)
    assert all(len({one.model for one in its}) == 1 for its in first.plans.values())


def test_plans_that_nobody_would_get_leave_only_where_memory_is_short() -> None:
    shares = {SIX: 0.97, ServedPlan(model="tech", depth=2): 0.019}
    assert layouts(worker(megabytes=200), shares=shares)[0].union == plans(*MODELS)
    short = layouts(worker(megabytes=26), shares=shares)
    deepest = {ServedPlan(model=model, depth=12) for model in MODELS}
    assert short[0].union == plans(*MODELS)
    assert short[1].union == {SIX} | deepest


def test_a_barred_plan_is_in_no_set_and_a_model_without_its_safe_plan_in_none() -> None:
    shallow = layouts(worker(), barred=lambda profile, depth: (profile.model, depth) == ("prose", 2))
    assert shallow[0].union == plans(*MODELS) - {ServedPlan(model="prose", depth=2)}
    safe = layouts(worker(), barred=lambda profile, depth: (profile.model, depth) == ("prose", 12))
    assert [one.union for one in safe] == [plans("tech")]


def test_the_quickest_layout_is_chosen_and_others_are_not_looked_at_while_memory_is_not_short() -> None:
    looked: list[Layout] = []

    def seconds(one: Layout) -> float:
        looked.append(one)
        return float(len(one.union))

    ample = layouts(worker())
    assert choose_set(ample, lambda one: one, seconds) == (ample[0], ample[0])
    assert looked == ample[:1]
    short = layouts(worker(megabytes=26))
    assert choose_set(short, lambda one: one, seconds) == (short[1], short[1])
    assert choose_set([], lambda one: one, seconds) is None


def test_a_set_that_contains_a_refused_one_is_not_chosen() -> None:
    found = layouts(worker())
    chosen = choose_set(found, lambda one: one, lambda one: 1.0, [plans(*MODELS)])
    assert chosen is not None
    assert len({one.model for one in chosen[0].union}) == 1
    assert choose_set(found, lambda one: one, lambda one: 1.0, [plans("prose"), plans("tech")]) is None


# -- what it costs ----------------------------------------------------------------------------------------


def test_the_head_is_what_a_steps_row_takes_at_depth_zero() -> None:
    def timed(depth: int) -> DecodeSpeed:
        return DecodeSpeed(batch=10, step_seconds=10 * (3e-5 + depth * 1e-5))

    exits = [one.model_copy(update={"decode": (timed(one.depth),)}) for one in PROSE.exits]
    profile = PROSE.model_copy(update={"exits": tuple(exits)})
    assert head_seconds(profile) == pytest.approx(3e-5)
    cost = probe_cost([profile], 32)
    assert cost.first_seconds == pytest.approx(12 * 3e-5)
    assert cost.further_seconds == pytest.approx(12 * 3e-5 + 32 / exits[0].prefill_tokens_per_second)


def test_a_plan_costs_its_share_of_a_full_batch_or_for_latency_a_step_at_the_present_load() -> None:
    def cost(objective: Objective) -> tuple[float, float]:
        found = plan_cost(
            PROSE, SIX, batch=16, load=1, prompt_tokens=60, output_tokens=80, objective=objective
        )
        return found.seconds, found.latency_seconds

    one = PROSE.at(6)
    full = 0.012 / 16 + 60 / 80 / one.prefill_tokens_per_second
    assert cost(Objective.THROUGHPUT) == pytest.approx((full, 0.006))
    assert cost(Objective.LATENCY) == pytest.approx((0.006, 0.006))


def test_the_quickest_plan_within_the_bound_or_the_best_if_there_is_none() -> None:
    two, six, twelve = (ServedPlan(model="prose", depth=depth) for depth in DEPTHS)
    increases, seconds = {two: 0.2, six: 0.03, twelve: 0.0}, {two: 1.0, six: 2.0, twelve: 3.0}
    assert quickest_within(increases, seconds, 0.05) == six
    assert quickest_within({two: 0.2, six: 0.1}, seconds, 0.05) == six


# -- what is offered --------------------------------------------------------------------------------------


def question(**fields: object) -> Question:
    def nothing(_: Knowledge) -> list[Recent]:
        return []

    values = {
        "examples": examples(),
        "profiles": {"prose": _even(PROSE), "tech": _even(TECH)},
        "workers": [worker()],
        "demand": Demand(60, 80, 1, Objective.THROUGHPUT),
        "in_force": {},
        "bound": 0.05,
        "min_gain": 0.05,
        "recent": nothing,
    }
    return Question(**(values | fields))  # type: ignore[arg-type]


def _even(profile: ModelProfile) -> ModelProfile:
    """A row takes 10 us a layer, whatever the batch."""
    exits = [
        one.model_copy(update={"decode": (DecodeSpeed(batch=1, step_seconds=1e-5 * one.depth),)})
        for one in profile.exits
    ]
    return profile.model_copy(update={"exits": tuple(exits)})


def mixed(known: Knowledge) -> list[Recent]:
    pairs = zip(recent(known, "prose", 30), recent(known, "tech", 30), strict=True)
    return [one for pair in pairs for one in pair]


def test_for_mixed_traffic_a_set_of_all_plans_is_quicker_than_any_single_plan() -> None:
    best = find_sets(question(recent=mixed)).best
    assert best is not None
    assert best.layout.union == plans(*MODELS)
    assert best.terms.seconds < 0.8 * best.single_seconds
    assert best.terms.increase <= 0.05
    assert math.isclose(sum(best.shares.values()), 1.0)


def test_the_sets_in_force_stay_unless_others_are_better_by_the_gain() -> None:
    in_force = {EVERY_WORKER: with_first(plans(*MODELS, depths=(6, 12)), SIX)}
    kept = find_sets(question(recent=mixed, in_force=in_force, min_gain=0.9))
    assert kept.best is not None
    assert kept.best.layout.plans == in_force
    left = find_sets(question(recent=mixed, in_force=in_force, min_gain=0.0))
    assert left.best is not None
    assert left.best.layout.union == plans(*MODELS)
    # The router goes on with the sets in force until others are decided on.
    assert set(left.expected) >= {union(in_force), plans(*MODELS)}


def test_sets_in_force_that_were_refused_or_do_not_fit_are_left() -> None:
    in_force = {EVERY_WORKER: tuple(plans(*MODELS))}
    refused = find_sets(question(in_force=in_force, refused=[plans(*MODELS)], min_gain=0.9)).best
    assert refused is not None
    assert len({one.model for one in refused.layout.union}) == 1
    assert find_sets(question(in_force=in_force, workers=[worker(megabytes=5)])) == Answer()


def test_what_was_learnt_from_the_same_examples_is_not_learnt_again() -> None:
    first = find_sets(question())
    again = find_sets(question(before=first, recent=mixed))
    assert first.best is not None
    assert again.best is not None
    assert again.best.knowledge is first.best.knowledge
    assert again.best.terms != first.best.terms, "but the terms are those of the recent requests"
    # With less memory the batch is another one, and so is what plans cost.
    short = find_sets(question(before=first, workers=[worker(megabytes=27)])).best
    assert short is not None
    assert short.knowledge is not first.best.knowledge


def test_a_bar_keeps_a_plan_out_of_the_offer() -> None:
    bar = Bar(model="prose", depth=2, time=2000.0, reason="a test")
    best = find_sets(question(bars=[bar])).best
    assert best is not None
    assert best.layout.union == plans(*MODELS) - {ServedPlan(model="prose", depth=2)}


@pytest.mark.parametrize(
    ("slo", "said"),
    [
        (Slo(), ""),
        (Slo(Objective.LATENCY, 0.02), ""),
        (Slo(Objective.ACCURACY), "objective accuracy"),
        (Slo(Objective.ENERGY), "objective energy"),
        (Slo(max_perplexity_increase=None), "needs a bound on perplexity"),
        (Slo(min_agreement=0.9, max_tpot_seconds=1.0), "min_agreement and max_tpot_seconds"),
        (Slo(max_ttft_seconds=1.0), "max_ttft_seconds"),
    ],
)
def test_an_slo_that_no_router_serves_is_named(slo: Slo, said: str) -> None:
    assert said in why_single(slo, SETTINGS)
    assert bool(said) == bool(why_single(slo, SETTINGS))
    assert "min_exit_share" in why_single(slo, SETTINGS.model_copy(update={"min_exit_share": 0.5})) or said


# -- the decision -----------------------------------------------------------------------------------------

SETS = {EVERY_WORKER: tuple(sorted(plans(*MODELS), key=str))}


def offer(seconds: float) -> SetOffer:
    """A set that takes so many seconds a token, where the best single plan takes 1."""
    return SetOffer(
        plans=SETS,
        seconds=seconds,
        single=SIX,
        single_seconds=1.0,
        examples=60,
        price=1e-4,
        increase=0.03,
        error=0.01,
    )


def situation(**fields: object) -> Situation:
    values = {
        "trigger": Trigger.ROUTING,
        "slo": Slo(),
        "history": {"prose": PROSE, "tech": TECH},
        "candidates": MODELS,
        "workers": (worker(), worker("b", pinned=True)),
        "plan": ServedPlan(model="prose", depth=12),
        "prompt_tokens": 60,
        "output_tokens": 80,
    }
    return Situation.model_validate(values | fields)


def test_a_set_may_cost_a_premium_over_the_single_plan() -> None:
    decision = decide(situation(offer=offer(1.04)), SETTINGS)
    assert decision.plans == {}
    assert "one plan for all" in decision.reason
    decision = decide(situation(offer=offer(1.02)), SETTINGS)
    assert union(decision.plans) == plans(*MODELS)
    assert decision.moves


def test_a_set_in_force_stays_until_a_single_plan_beats_it_by_premium_and_gain() -> None:
    for seconds, stays in ((1.07, True), (1.09, False)):
        decision = decide(situation(offer=offer(seconds), plans=SETS), SETTINGS)
        assert bool(decision.plans) == stays, decision.reason


def test_the_plan_after_a_router_is_what_the_router_has_learnt() -> None:
    decision = decide(situation(offer=offer(2.0), plans=SETS), SETTINGS)
    assert decision.plans == {}
    assert decision.plan == offer(2.0).single
    assert "learnt" in decision.reason


@pytest.mark.parametrize("fields", [{"unlike_share": 0.5}, {"is_best_effort": True}])
def test_a_set_in_force_stays_while_the_traffic_is_new(fields: dict[str, object]) -> None:
    slow = offer(2.0).model_copy(update=fields)
    assert decide(situation(offer=slow, plans=SETS), SETTINGS).plans
    assert not decide(situation(offer=slow), SETTINGS).plans


def test_the_first_plan_of_a_set_is_the_single_plan() -> None:
    decision = decide(situation(offer=offer(0.5)), SETTINGS)
    assert decision.plan is not None
    assert decision.plans[EVERY_WORKER][0] == decision.plan
    assert with_first(plans("prose"), ServedPlan(model="prose", depth=4))[0].depth == 12
    assert with_first(plans("prose", "tech"), ServedPlan(model="tech", depth=4))[0] == ServedPlan(
        model="tech", depth=12
    )


def test_a_decision_names_every_plan_of_each_worker_and_the_pin_of_a_pinned_one() -> None:
    decision = decide(situation(offer=offer(0.5)), SETTINGS)
    named = {name: [one for one in decision.chosen if one.worker_id == name] for name in ("a", "b")}
    assert {(one.model, one.depth) for one in named["a"]} == {
        (one.model, one.depth) for one in plans(*MODELS)
    }
    assert [(one.model, one.depth, one.pinned) for one in named["b"]] == [("prose", 12, True)]


def test_a_change_of_sets_waits_for_the_dwell_but_not_where_an_operator_asks() -> None:
    young = {"offer": offer(0.5), "requests_since_move": 10}
    held = decide(situation(**young), SETTINGS)
    assert (held.plans, held.again_after_requests) == ({}, 15)
    assert "its dwell 25" in held.reason
    assert decide(situation(**young, trigger=Trigger.SLO), SETTINGS).plans


def test_without_an_offer_one_plan_serves_all_and_the_reason_says_why() -> None:
    left = decide(situation(plans=SETS, no_offer="a router does not serve that"), SETTINGS)
    assert left.plans == {}
    assert left.moves
    assert left.reason.startswith("one plan for all: a router does not serve that")
    plain = situation(trigger=Trigger.REASSESSMENT)
    unrouted = plain.model_copy(update={"no_offer": "too few examples"})
    assert decide(unrouted, SETTINGS) == decide(plain, SETTINGS), "nothing is said where nothing changes"


def test_sets_stay_while_no_worker_serves() -> None:
    assert decide(situation(workers=(), plans=SETS), SETTINGS).plans == SETS


def test_a_situation_of_an_earlier_version_has_no_sets() -> None:
    old = situation().model_dump(mode="json", exclude={"plans", "offer", "no_offer"})
    assert Situation.model_validate(old) == situation()
