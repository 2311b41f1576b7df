"""Promises of the policy: bounds, objectives, breaches, hysteresis and replay."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helios.history import DecodeSpeed, ModelProfile, RequestSample
from helios.served import ServedPlan
from helios.slo import Objective, Slo
from services.controller.decision import Decision, Option
from services.controller.policy.breach import breach_limit, is_breached
from services.controller.policy.decide import contradiction, decide
from services.controller.policy.settings import Moves, PolicySettings
from services.controller.situation import Bar, Reading, Situation, Trigger, WorkerView
from tests.profiles import exit_profile, model_profile

SETTINGS = PolicySettings()
# At 4 bytes per token, 0.01 nats per byte are 4.1 % of perplexity.
SMALL = model_profile("small", [exit_profile(2, 0.92), exit_profile(4, 0.905), exit_profile(6, 0.9)])
LARGE = model_profile("large", [exit_profile(8, 0.9005), exit_profile(16, 0.899)])


def worker(worker_id: str = "w-0", model: str = "small", depth: int = 6, **fields: object) -> WorkerView:
    values = {"tokenizer_id": "t", "max_running": 16} | fields
    return WorkerView(worker_id=worker_id, model=model, depth=depth, **values)


def situation(
    profiles: Sequence[ModelProfile] = (SMALL, LARGE),
    workers: Sequence[WorkerView] = (worker(),),
    slo: Slo | None = None,
    trigger: Trigger = Trigger.REASSESSMENT,
    **fields: object,
) -> Situation:
    return Situation(
        trigger=trigger,
        slo=slo or Slo(),
        history={profile.model: profile for profile in profiles},
        candidates=tuple(profile.model for profile in profiles),
        workers=tuple(workers),
        **({"prompt_tokens": 20, "output_tokens": 50} | fields),
    )


def option(decision: Decision, model: str, depth: int) -> Option:
    return next(one for one in decision.options if (one.model, one.depth) == (model, depth))


def plan(model: str, depth: int) -> ServedPlan:
    return ServedPlan(model=model, depth=depth)


def test_smallest_depth_within_the_bound_of_the_best_candidate_is_chosen() -> None:
    decision = decide(situation(), SETTINGS)
    assert decision.plan == plan("small", 4)
    assert decision.moves
    refused = option(decision, "small", 2)
    assert refused.perplexity_increase == pytest.approx(math.exp((0.92 - 0.899) * 4) - 1)
    assert "max_perplexity_increase" in refused.refused
    assert option(decision, "small", 4).refused == ""


def test_quality_is_compared_per_byte_and_told_per_token_of_the_best() -> None:
    """At equal quality, a tokenizer with longer tokens gives a higher perplexity per token."""
    coarse = SMALL.model_copy(update={"bytes_per_token": 8.0})
    assert decide(situation([coarse, LARGE]), SETTINGS).options == decide(situation(), SETTINGS).options


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective.THROUGHPUT, plan("small", 4)),
        (Objective.LATENCY, plan("small", 4)),
        (Objective.ACCURACY, plan("large", 16)),
    ],
)
def test_the_objective_decides_among_what_is_within_the_bounds(
    objective: Objective, expected: ServedPlan
) -> None:
    slo = Slo(objective=objective)
    assert decide(situation(slo=slo, trigger=Trigger.SLO), SETTINGS).plan == expected


def test_freed_memory_makes_a_larger_batch_and_more_tokens_a_second() -> None:
    held = worker(max_running=64, memory_bytes=6_000_000 + 10 * 45 * 512 * 6)
    decision = decide(situation(workers=[held]), SETTINGS)
    assert option(decision, "small", 6).batch == 10
    assert option(decision, "small", 4).batch > 30
    assert option(decision, "large", 8).batch == 0
    assert "memory" in option(decision, "large", 8).refused
    unlimited = decide(situation(), SETTINGS)
    assert option(unlimited, "small", 4).tokens_per_second > option(decision, "small", 6).tokens_per_second


def test_energy_objective_is_refused_until_energy_is_known() -> None:
    slo = Slo(objective=Objective.ENERGY)
    asked = situation(slo=slo, trigger=Trigger.SLO)
    assert decide(asked, SETTINGS).plan == plan("small", 6)
    assert "energy: unknown" in (contradiction(asked, SETTINGS) or "")
    metered = model_profile(
        "small", [exit_profile(4, 0.9, joules_per_token=1.0), exit_profile(6, 0.9, joules_per_token=2.0)]
    )
    decision = decide(situation([metered, LARGE], slo=slo, trigger=Trigger.SLO), SETTINGS)
    assert decision.plan == plan("small", 4)


def test_contradictory_bounds_keep_the_plan_and_are_named() -> None:
    slo = Slo(max_perplexity_increase=0.001, max_tpot_seconds=0.003)
    asked = situation(slo=slo)
    decision = decide(asked, SETTINGS)
    assert decision.plan == plan("small", 6)
    assert not decision.moves
    said = contradiction(asked, SETTINGS)
    assert said is not None
    for bound in ("max_perplexity_increase", "max_tpot_seconds"):
        assert bound in decision.reason
        assert bound in said
    # The message names the option that breaks the fewest bounds, so operators see which bound to loosen.
    assert "small at depth 2 breaks the fewest (max_perplexity_increase: " in said
    assert contradiction(situation(), SETTINGS) is None


def test_agreement_and_exit_share_can_be_bounded() -> None:
    unsure = model_profile("small", [exit_profile(4, 0.9, sure=0.3, agreement=0.5), exit_profile(6, 0.9)])
    assert decide(situation([unsure]), SETTINGS).plan == plan("small", 4)
    bounded = decide(situation([unsure], slo=Slo(min_agreement=0.6)), SETTINGS)
    assert bounded.plan == plan("small", 6)
    assert "min_agreement" in option(bounded, "small", 4).refused
    assert decide(situation([unsure]), PolicySettings(min_exit_share=0.5)).plan == plan("small", 6)


def test_nothing_is_changed_without_a_profile_or_a_worker() -> None:
    blind = situation().model_copy(update={"history": {}})
    assert "no candidate has been profiled" in decide(blind, SETTINGS).reason
    assert decide(blind, SETTINGS).plan == plan("small", 6)
    assert decide(situation(workers=[]), SETTINGS).plan is None


def test_an_unprofiled_candidate_is_said() -> None:
    asked = situation().model_copy(update={"candidates": ("small", "large", "new")})
    assert "not profiled: new" in decide(asked, SETTINGS).reason


def test_a_model_of_another_tokenizer_is_refused() -> None:
    foreign = model_profile("small", SMALL.exits, tokenizer_id="other")
    decision = decide(situation([foreign, LARGE]), SETTINGS)
    assert decision.plan == plan("large", 8)
    assert "tokenizer" in option(decision, "small", 4).refused


def breach(profiles: Sequence[ModelProfile], moves: Moves = Moves.BOTH, **fields: object) -> Decision:
    breached = worker(depth=2, window_tokens=100, window_high_exit_tokens=60, running=4, tokens_in_flight=400)
    bar = Bar(model="small", depth=2, time=2000, reason="confidence breach", shallower=True)
    asked = situation(
        profiles,
        [breached],
        Slo(max_perplexity_increase=0.2),
        Trigger.BREACH,
        plan=plan("small", 2),
        bars=(bar,),
        **fields,
    )
    return decide(asked, PolicySettings(moves=moves))


def test_a_breach_is_answered_by_the_cheaper_of_deeper_and_switch() -> None:
    quick = model_profile("large", [exit_profile(8, 0.9, step_seconds=0.003), exit_profile(16, 0.899)])
    slow_to_load = model_profile(
        "large", [one.model_copy(update={"load_seconds": 1e4}) for one in quick.exits]
    )
    assert breach([SMALL, LARGE]).plan == plan("small", 4)
    assert breach([SMALL, quick]).plan == plan("large", 8)
    deeper = breach([SMALL, slow_to_load])
    assert deeper.plan == plan("small", 4)
    assert "w-0 60 of 100" in deeper.reason
    assert "confidence breach" in option(deeper, "small", 2).refused


def test_a_breach_costs_the_load_of_what_is_missing_and_the_prefill_of_what_is_in_flight() -> None:
    answer = breach([SMALL, LARGE])
    # Two of four layers are loaded already.
    assert option(answer, "small", 4).cost_seconds == pytest.approx(0.1 / 2 + 400 / (2000 / 4))
    assert option(answer, "large", 8).cost_seconds == pytest.approx(0.1 + 400 / (2000 / 8))
    assert option(decide(situation(), SETTINGS), "small", 2).cost_seconds == 0


def test_moves_can_be_restricted_to_one_kind() -> None:
    assert breach([SMALL, LARGE], Moves.DEEPEN).plan == plan("small", 4)
    assert breach([SMALL, LARGE], Moves.SWITCH).plan == plan("large", 8)
    alone = breach([SMALL], Moves.SWITCH)
    assert alone.plan == plan("small", 2)
    assert "no deeper exit or other model" in alone.reason


def test_a_breached_plan_comes_back_once_its_model_is_profiled_anew() -> None:
    bar = Bar(model="small", depth=4, time=2000, reason="confidence breach", shallower=True)
    assert decide(situation(bars=(bar,)), SETTINGS).plan == plan("small", 6)
    anew = SMALL.model_copy(update={"time": 2001.0})
    assert decide(situation([anew, LARGE], bars=(bar,)), SETTINGS).plan == plan("small", 4)


def test_a_breach_is_half_of_a_full_window_or_more_than_the_profile_expects() -> None:
    sure = model_profile("small", [exit_profile(2, 0.9, sure=0.8), exit_profile(6, 0.9)])
    unsure = model_profile("small", [exit_profile(2, 0.9, sure=0.4), exit_profile(6, 0.9)])

    def view(tokens: int, high: int, **fields: object) -> WorkerView:
        return worker(depth=2, window_tokens=tokens, window_high_exit_tokens=high, **fields)

    assert breach_limit(view(0, 0), sure, SETTINGS) == 50
    assert 70 < breach_limit(view(0, 0), unsure, SETTINGS) < 80
    # The worker's own threshold counts. At 0 every token is sure.
    assert breach_limit(view(0, 0, threshold=0.0), unsure, SETTINGS) == 50
    assert not is_breached(view(100, 100, threshold=1.0), unsure, SETTINGS)

    assert not is_breached(view(99, 99), sure, SETTINGS)
    assert not is_breached(view(100, 49), sure, SETTINGS)
    assert is_breached(view(100, 50), sure, SETTINGS)
    assert is_breached(view(120, 60), sure, SETTINGS)
    assert not is_breached(view(100, 65), unsure, SETTINGS)
    assert is_breached(view(100, 80), unsure, SETTINGS)


def test_a_small_gain_does_not_move_and_a_large_one_does() -> None:
    def better_by(gain: float) -> Decision:
        rival = model_profile("rival", [exit_profile(6, 0.9, step_seconds=0.006 * (1 - gain))])
        here = model_profile("small", [exit_profile(6, 0.9)])
        return decide(situation([here, rival], plan=plan("small", 6)), SETTINGS)

    assert better_by(0.04).plan == plan("small", 6)
    assert "less than 5.0%" in better_by(0.04).reason
    assert better_by(0.4).plan == plan("rival", 6)


def test_a_move_that_costs_more_than_it_gains_is_not_made() -> None:
    rival = model_profile("rival", [exit_profile(6, 0.9, step_seconds=0.003, load_seconds=1e4)])
    here = model_profile("small", [exit_profile(6, 0.9)])
    decision = decide(situation([here, rival], plan=plan("small", 6)), SETTINGS)
    assert decision.plan == plan("small", 6)
    assert "costs included" in option(decision, "rival", 6).refused


def test_a_plan_stays_for_its_dwell_unless_it_breaks_the_bound() -> None:
    kept = decide(situation(plan=plan("small", 6), requests_since_move=10), SETTINGS)
    assert kept.plan == plan("small", 6)
    assert "dwell" in kept.reason
    assert kept.again_after_requests == SETTINGS.min_dwell_requests - 10
    moved = decide(situation(plan=plan("small", 2), requests_since_move=10), SETTINGS)
    assert moved.plan == plan("small", 4)
    assert moved.again_after_requests is None


def test_a_move_is_urgent_when_the_plan_before_breaks_a_bound_or_traffic_has_left_it() -> None:
    def is_urgent(depth: int, trigger: Trigger = Trigger.FOLLOW_UP) -> bool:
        decision = decide(situation(plan=plan("small", depth), trigger=trigger), SETTINGS)
        assert decision.moves == (depth != 4)
        return decision.urgent

    assert is_urgent(2)
    assert not is_urgent(6)
    assert is_urgent(6, Trigger.DRIFT)
    assert not is_urgent(4, Trigger.DRIFT)


def test_what_only_the_dwell_kept_out_is_chosen_at_its_end() -> None:
    now = situation(plan=plan("small", 6), requests_since_move=SETTINGS.min_dwell_requests)
    decision = decide(now.model_copy(update={"trigger": Trigger.DWELL}), SETTINGS)
    assert decision.plan == plan("small", 4)
    assert decision.again_after_requests is None


@pytest.mark.parametrize("trigger", list(Trigger))
def test_pinned_workers_never_move(trigger: Trigger) -> None:
    held = worker("w-1", "large", 16, pinned=True)
    decision = decide(situation(workers=[worker(), held], trigger=trigger), SETTINGS)
    chosen = {one.worker_id: (one.model, one.depth, one.pinned) for one in decision.chosen}
    assert chosen["w-1"] == ("large", 16, True)
    assert "holds w-1" in decision.reason


def measured_at(increase: float, error: float, depth: int = 4) -> list[ModelProfile]:
    """Model `small` with an exit whose perplexity is `increase` above full depth, with a standard error.

    A request has 1,000 bytes, at 4 bytes per token, so that `increase` and `error` are exact.
    """
    rate = math.log1p(increase) / 4
    # The standard error of the mean of four values rate +- d is d * sqrt(4 / (4 * 3)). Student's t with three
    # degrees of freedom has three times the variance of a normal distribution.
    spread = error / (1 + increase) / 4
    samples = [
        RequestSample(id=str(number), text_bytes=1000, nats=((0.9 + rate + sign * spread) * 1000, 900.0))
        for number, sign in enumerate((1, -1, 1, -1))
    ]
    exits = [exit_profile(depth, 0.9 + rate), exit_profile(6, 0.9)]
    return [model_profile("small", exits).model_copy(update={"samples": tuple(samples)})]


def test_the_error_of_a_perplexity_is_told() -> None:
    one = option(decide(situation(measured_at(0.03, 0.01)), SETTINGS), "small", 4)
    assert one.perplexity_increase == pytest.approx(0.03)
    assert one.perplexity_increase_error == pytest.approx(0.01)
    full = option(decide(situation(measured_at(0.03, 0.01)), SETTINGS), "small", 6)
    assert (full.perplexity_increase, full.perplexity_increase_error) == (0, 0)


def test_what_two_models_find_hard_alike_does_not_count_as_error() -> None:
    """The requests differ from each other by far more than the models do."""
    hard = (0.5, 1.5, 0.7, 1.1)

    def model(name: str, excess: float, depth: int) -> ModelProfile:
        samples = tuple(
            RequestSample(id=str(number), text_bytes=1000, nats=((rate + excess) * 1000,))
            for number, rate in enumerate(hard)
        )
        mean = sum(hard) / len(hard) + excess
        return model_profile(name, [exit_profile(depth, mean)]).model_copy(update={"samples": samples})

    decision = decide(situation([model("small", 0.005, 6), model("large", 0, 16)]), SETTINGS)
    assert option(decision, "small", 6).perplexity_increase_error == pytest.approx(0, abs=1e-9)
    alone = model("small", 0.005, 6).model_copy(update={"samples": ()})
    decision = decide(situation([alone, model("large", 0, 16)]), SETTINGS)
    assert option(decision, "small", 6).perplexity_increase_error is None
    assert option(decision, "small", 6).perplexity_increase == pytest.approx(math.expm1(0.005 * 4))


@pytest.mark.parametrize(
    ("increase", "enters", "stays"),
    [(0.03, True, True), (0.049, False, True), (0.054, False, True), (0.07, False, False)],
)
def test_noise_at_the_bound_keeps_a_plan_out_and_lets_one_in_force_stay(
    increase: float, enters: bool, stays: bool
) -> None:
    seen, patient = measured_at(increase, 0.01), PolicySettings(leave_sigmas=0.5)
    entered = decide(situation(seen, plan=plan("small", 6)), patient).plan
    assert (entered == plan("small", 4)) is enters
    kept = decide(situation(seen, [worker(depth=4)], plan=plan("small", 4)), patient)
    assert (kept.plan == plan("small", 4)) is stays
    assert (f"{increase:.4g} is above 0.05 by more than noise" in kept.reason) is not stays


def test_a_plan_that_stays_beyond_the_bound_is_said_to_be_measured_on_too_little() -> None:
    seen, patient = measured_at(0.054, 0.01), PolicySettings(leave_sigmas=0.5)
    kept = decide(situation(seen, [worker(depth=4)], plan=plan("small", 4)), patient)
    assert kept.plan == plan("small", 4)
    assert "measured at +5.4%, on 4 requests with a standard error of 1.0%, bound 5.0%" in kept.reason
    # There is one request, which gives no standard error, and no other plan.
    alone = model_profile("small", [exit_profile(4, 0.95), exit_profile(6, 0.9)])
    one = RequestSample(id="a", text_bytes=1000, nats=(950.0, 900.0))
    alone = alone.model_copy(update={"samples": (one,)})
    bar = Bar(model="small", depth=6, time=alone.time, reason="could not load it")
    kept = decide(situation([alone], [worker(depth=4)], plan=plan("small", 4), bars=(bar,)), SETTINGS)
    assert kept.plan == plan("small", 4)
    assert "on 1 request: too few to tell that from the bound of 5.0%" in kept.reason
    within = measured_at(0.03, 0.01)
    assert (
        "measured" not in decide(situation(within, [worker(depth=4)], plan=plan("small", 4)), SETTINGS).reason
    )


def test_a_mixture_says_little_of_which_model_is_better() -> None:
    """Each model is far better on half of the requests. This is no reason to leave the plan in force."""

    def model(name: str, excess: float, first: float, depth: int) -> ModelProfile:
        samples = tuple(
            RequestSample(id=str(number), text_bytes=1000, nats=(nats + excess * 1000, nats))
            for number in range(9)
            for nats in [900 + (first if number % 2 else 100 - first)]
        )
        mean = sum(one.nats[1] for one in samples) / 9000
        exits = [exit_profile(depth, mean + excess), exit_profile(6, mean)]
        return model_profile(name, exits).model_copy(update={"samples": samples})

    other = model("other", 0.001, 0.0, 2)
    here = model("small", 0.001, 100.0, 4)
    kept = decide(situation([here, other], [worker(depth=4)], plan=plan("small", 4)), SETTINGS)
    assert kept.plan == plan("small", 4)
    # The nats of all prompts decide it: more prompts are of the kind on which the plan is bad.
    reading = Reading(model="small", depth=4, nats_per_token=3.9, error=0.01)
    more = [
        one.model_copy(
            update={
                "samples": tuple(
                    sample.model_copy(update={"id": f"{turn} {sample.id}"})
                    for turn in range(3)
                    for sample in one.samples
                )
            }
        )
        for one in (here, other)
    ]
    asked = situation(more, [worker(depth=4)], plan=plan("small", 4))
    assert decide(asked, SETTINGS).plan == plan("small", 4)
    moved = decide(asked.model_copy(update={"reading": reading}), SETTINGS)
    assert moved.plan == plan("other", 2)
    # A reading far from the evaluated requests is of other traffic, so it is not used.
    strange = reading.model_copy(update={"nats_per_token": 8.0})
    assert decide(asked.model_copy(update={"reading": strange}), SETTINGS).plan == plan("small", 4)


# Properties.


@settings(deadline=None, max_examples=100)
@given(
    st.floats(0.0, 0.12),
    st.floats(0.002, 0.03),
    st.lists(st.floats(-0.49, 0.49), min_size=3, max_size=12),
    st.sampled_from([4, 6]),
)
def test_noise_of_quality_near_the_bound_causes_no_flapping(
    increase: float, error: float, noise: list[float], depth: int
) -> None:
    """The policy does not leave a plan and return to it while its measured perplexity varies by less than
    half of the band between entering and leaving."""
    band = SETTINGS.leave_sigmas * error
    visited = [plan("small", depth)]
    for one in noise:
        seen = measured_at(max(0.0, increase + one * band), error)
        current = visited[-1]
        chosen = decide(situation(seen, [worker(depth=current.depth)], plan=current), SETTINGS).plan
        if chosen is not None and chosen != current:
            assert chosen not in visited
            visited.append(chosen)


positive = st.floats(0.0005, 0.05)


@st.composite
def profiles(draw: st.DrawFn) -> list[ModelProfile]:
    """Up to three models with up to four exits. Deeper exits are slower, and roughly better."""
    found = []
    for name in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        depths = sorted(draw(st.sets(st.integers(1, 24), min_size=1, max_size=4)))
        exits = [
            exit_profile(
                depth,
                draw(st.floats(0.85, 1.0)),
                step_seconds=depth * draw(st.floats(0.0005, 0.002)),
                sure=draw(st.floats(0, 1)),
                agreement=draw(st.floats(0, 1)),
                load_seconds=draw(st.floats(0, 2)),
            )
            for depth in depths
        ]
        found.append(model_profile(name, exits))
    return found


def any_plan(found: Sequence[ModelProfile]) -> st.SearchStrategy[ServedPlan]:
    return st.sampled_from([plan(profile.model, one.depth) for profile in found for one in profile.exits])


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    found = draw(profiles())
    current = draw(any_plan(found))
    slo = Slo(
        objective=draw(st.sampled_from([Objective.THROUGHPUT, Objective.LATENCY, Objective.ACCURACY])),
        max_perplexity_increase=draw(st.none() | st.floats(0, 0.5)),
        min_agreement=draw(st.none() | st.floats(0, 1)),
        max_tpot_seconds=draw(st.none() | positive),
    )
    workers = [
        worker(
            f"w-{number}",
            current.model,
            current.depth,
            pinned=draw(st.booleans()),
            running=draw(st.integers(0, 20)),
            tokens_in_flight=draw(st.integers(0, 2000)),
            memory_bytes=draw(st.none() | st.integers(500_000, 40_000_000)),
        )
        for number in range(draw(st.integers(1, 3)))
    ]
    return situation(
        found,
        workers,
        slo,
        draw(st.sampled_from(list(Trigger))),
        plan=draw(st.none() | st.just(current)),
        requests_since_move=draw(st.none() | st.integers(0, 300)),
    )


@settings(deadline=None, max_examples=150)
@given(situations())
def test_no_option_outside_the_bounds_is_chosen_when_one_is_inside(asked: Situation) -> None:
    assume(asked.free)
    decision = decide(asked, SETTINGS)
    broken = {"max_", "min_", "memory"}
    inside = [one for one in decision.options if not any(word in one.refused for word in broken)]
    chosen = next(one for one in decision.options if one.plan == decision.plan)
    # The answer to a breach is the next exit or another model. It is within the bounds too.
    if inside and decision.moves:
        assert chosen.refused == ""
    if inside and asked.trigger is not Trigger.BREACH:
        assert chosen in inside


@settings(deadline=None, max_examples=100)
@given(situations())
def test_a_decision_is_replayed_from_its_json(asked: Situation) -> None:
    decision = decide(asked, SETTINGS)
    again = Situation.model_validate_json(asked.model_dump_json())
    kept = PolicySettings.model_validate_json(SETTINGS.model_dump_json())
    assert again == asked
    assert decide(again, kept) == decision == Decision.model_validate_json(decision.model_dump_json())


@settings(deadline=None, max_examples=100)
@given(situations())
def test_workers_that_an_operator_holds_keep_their_plan(asked: Situation) -> None:
    chosen = {one.worker_id: one for one in decide(asked, SETTINGS).chosen}
    for view in asked.workers:
        if view.pinned:
            held = chosen[view.worker_id]
            assert (held.model, held.depth) == (view.model, view.depth)


@settings(deadline=None, max_examples=100)
@given(profiles(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_looser_bound_never_asks_for_more_layers(
    found: list[ModelProfile], one: float, other: float
) -> None:
    def depths(bound: float) -> dict[str, int]:
        asked = situation(found, [worker()], Slo(max_perplexity_increase=bound), Trigger.START)
        options = decide(asked, SETTINGS).options
        inside: dict[str, int] = {}
        for weighed in options:
            if "max_perplexity" not in weighed.refused:
                inside.setdefault(weighed.model, weighed.depth)
        return inside

    tight, loose = depths(min(one, other)), depths(max(one, other))
    assert tight.keys() <= loose.keys()
    assert all(loose[model] <= depth for model, depth in tight.items())


@settings(deadline=None, max_examples=60)
@given(profiles(), st.data())
def test_noise_in_measurements_causes_no_flapping(found: list[ModelProfile], data: st.DataObject) -> None:
    """The policy never leaves a plan and returns while measurements vary by less than half of `min_gain`."""
    current = data.draw(any_plan(found))
    noise = st.floats(
        1 - SETTINGS.min_gain / 2, 1 + SETTINGS.min_gain / 2, exclude_min=True, exclude_max=True
    )

    def measured(profile: ModelProfile) -> ModelProfile:
        exits = []
        for one in profile.exits:
            factor = data.draw(noise)
            decode = tuple(
                DecodeSpeed(batch=point.batch, step_seconds=point.step_seconds * factor)
                for point in one.decode
            )
            exits.append(
                one.model_copy(
                    update={
                        "decode": decode,
                        "ttft_seconds": one.ttft_seconds * factor,
                        "prefill_tokens_per_second": one.prefill_tokens_per_second / factor,
                    }
                )
            )
        return profile.model_copy(update={"exits": tuple(exits)})

    slo = Slo(objective=data.draw(st.sampled_from([Objective.THROUGHPUT, Objective.LATENCY])))
    visited = [current]
    for _ in range(6):
        seen = situation(
            [measured(profile) for profile in found],
            [worker(model=current.model, depth=current.depth)],
            slo,
            plan=current,
        )
        chosen = decide(seen, SETTINGS).plan
        assert chosen is not None
        if chosen != current:
            assert chosen not in visited
            visited.append(chosen)
            current = chosen
