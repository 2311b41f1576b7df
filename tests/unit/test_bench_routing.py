"""The simulation of the router in `helios bench paper --only policy`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from bench.paper.policy import traffic
from bench.paper.policy.comparison import halves
from bench.paper.policy.hindsight import Hindsight
from bench.paper.policy.prices import Prices, prices
from bench.paper.policy.routing import RoutedRun, examples, learn, rest_nats, route
from bench.paper.policy.simulation import Run, Scene
from bench.paper.policy.traffic import Record, Request
from bench.texts import held_out
from helios.routing.knowledge import Knowledge
from helios.routing.probe import read_positions
from helios.served import ServedPlan
from tests.profiles import exit_profile, model_profile

TOKENS, FIRST = 48, 24
MODELS = dict(zip(held_out.DOMAINS, ("prose-model", "technical-model"), strict=True))
PROFILES = {
    name: model_profile(name, [exit_profile(2, 0.7), exit_profile(4, 0.7)]) for name in MODELS.values()
}
# Nats per token at depths 2 and 4. Half of the own requests are easy: depth 2 is as good as depth 4.
EASY, HARD, FOREIGN = (2.0, 2.0), (3.5, 3.0), (4.5, 4.2)


def pools(count: int = 60) -> dict[str, list[Request]]:
    draw = np.random.default_rng(1)

    def request(domain: str, number: int) -> Request:
        own = EASY if number % 2 else HARD
        noise = draw.normal(0, 0.2, TOKENS)

        def record(means: tuple[float, float]) -> Record:
            nats = np.array([mean + noise for mean in means], dtype=np.float32)
            sure = np.full((2, TOKENS), 0.8, dtype=np.float32)
            return Record((2, 4), sure, np.ones((2, TOKENS), dtype=np.bool_), nats, 4 * TOKENS)

        records = {model: record(own if of == domain else FOREIGN) for of, model in MODELS.items()}
        # The domains share no token.
        first = 10 + 50 * list(held_out.DOMAINS).index(domain)
        ids = tuple(int(one) for one in draw.integers(first, first + 50, TOKENS))
        return Request(domain, domain, first, ids, records)

    return {domain: [request(domain, number) for number in range(count)] for domain in held_out.DOMAINS}


POOLS = pools()
LEARNT, MEASURED = halves(POOLS, seed=0)


def scene(
    shape: str = traffic.STANDARD, of: Mapping[str, Sequence[Request]] = MEASURED, phase: int = 60
) -> Scene:
    requests = traffic.trace(of, traffic.SHAPES[shape], phase, seed=0)
    thresholds = {model: {2: 0.5} for model in PROFILES}
    return Scene(
        requests,
        PROFILES,
        thresholds,
        {},
        batch=16,
        profiled_requests=5,
        prompt_tokens=16,
        router_evaluation_seconds=0.5,
        row_seconds=1e-4,
        judged_from=FIRST,
    )


def knowledge_of(world: Scene) -> tuple[Prices, Knowledge]:
    costs = prices(world)
    return costs, learn(examples(LEARNT, FIRST), world, costs)


def routed(world: Scene, seed: int = 0, *, knows_rest: bool = False) -> RoutedRun:
    costs, knowledge = knowledge_of(world)
    return route(world, costs, seed, knowledge=knowledge, knows_rest=knows_rest)


def at(model: str, depth: int) -> ServedPlan:
    return ServedPlan(model=model, depth=depth)


def test_a_probe_costs_its_readings_and_the_layers_that_do_not_serve() -> None:
    world = scene()
    costs = prices(world)
    assert costs.reading == pytest.approx(1e-4 * len(read_positions(FIRST, 12)))
    layers = FIRST / PROFILES["prose-model"].at(2).prefill_tokens_per_second
    assert costs.layers == {model: pytest.approx(layers) for model in PROFILES}
    # The layers of the model that serves are not computed again.
    assert costs.probing({"prose-model"}, at("prose-model", 4)) == pytest.approx(costs.reading)
    assert costs.probing({"prose-model"}, at("technical-model", 2)) == pytest.approx(costs.reading + layers)
    assert costs.probing(set(PROFILES), at("prose-model", 2)) == pytest.approx(2 * costs.reading + layers)
    assert costs.probe.further_seconds == pytest.approx(costs.reading + layers)
    assert costs.loading == pytest.approx(0.1)
    by_plan = {one.plan: one.seconds for one in costs.plans}
    assert by_plan == {plan: world.token_seconds(plan) for plan in by_plan}


def test_a_requests_time_is_its_tokens_its_probe_and_the_loading_once() -> None:
    world = scene()
    costs, _ = knowledge_of(world)
    run = routed(world)
    serving = sum(TOKENS * world.token_seconds(plan) for plan in run.plans)
    assert run.seconds == pytest.approx(serving + run.probing_seconds + costs.loading)
    assert run.probing_seconds >= len(run.plans) * costs.reading
    assert run.priced_seconds == run.seconds


def test_hindsight_measures_quality_on_the_rest_only() -> None:
    world = scene()
    spoilt = replace(world, requests=[_with_beginning(one, 99.0) for one in world.requests])
    run = Run(plans=[at("prose-model", 2)] * len(world.requests), seconds=1.0, tokens=1)
    found, same = Hindsight(world).figures(run), Hindsight(spoilt).figures(run)
    assert found.phase_increases == same.phase_increases
    whole = replace(spoilt, judged_from=0)
    assert Hindsight(whole).figures(run).phase_increases != found.phase_increases
    # Half of the prose requests are 0.5 nats worse at depth 2.
    hard = np.mean([number_is_hard(one) for one in world.requests[:60]])
    assert found.phase_increases["prose"] == pytest.approx(np.expm1(0.5 * hard), abs=1e-4)


def number_is_hard(request: Request) -> bool:
    nats = request.records[MODELS[request.domain]].nats
    return bool(nats[0].mean() - nats[1].mean() > 0.1)


def _with_beginning(request: Request, nats: float) -> Request:
    """The request with other nats at depth 4 before the rest."""

    def spoilt(record: Record) -> Record:
        found = record.nats.copy()
        found[1, :FIRST] = nats
        return replace(record, nats=found)

    return replace(request, records={model: spoilt(one) for model, one in request.records.items()})


def test_the_run_of_hindsight_takes_the_best_time_and_holds_the_bound() -> None:
    world = Hindsight(scene())
    best = world.figures(world.best())
    assert best.time_to_best == pytest.approx(1)
    assert best.worst_phase_increase <= 0.05


def test_the_router_beats_hindsight_where_requests_differ_and_holds_the_bound() -> None:
    world = scene()
    run = routed(world)
    found = Hindsight(world).figures(run)
    serving = run.seconds - run.moving_seconds - run.probing_seconds
    assert serving < Hindsight(world).best_seconds
    assert found.perplexity_increase <= 0.05
    # Each request goes to the model of its domain.
    for request, plan in zip(world.requests, run.plans, strict=True):
        assert plan.model == MODELS[request.domain]


@pytest.mark.parametrize("shape", list(traffic.SHAPES))
def test_the_oracle_is_never_worse_than_the_router(shape: str) -> None:
    world = scene(shape)
    router, oracle = routed(world), routed(world, knows_rest=True)
    assert oracle.probing_seconds == 0
    assert oracle.seconds <= router.seconds
    costs, knowledge = knowledge_of(world)
    price = knowledge.costs.max()
    plans = [one.plan for one in costs.plans]
    for request, plan in zip(world.requests, router.plans, strict=True):
        losses = knowledge.costs + price * rest_nats(request, plans, FIRST)
        assert losses.min() <= losses[plans.index(plan)]


def test_a_simulation_is_the_same_for_the_same_seed() -> None:
    world = scene()
    first, again = routed(world, 3), routed(world, 3)
    assert first.plans == again.plans
    assert (first.seconds, first.nats) == (again.seconds, again.nats)
    assert halves(POOLS, 1) == halves(POOLS, 1)
    assert halves(POOLS, 1)[0] != halves(POOLS, 2)[0]


def test_no_text_that_is_measured_trains_the_router() -> None:
    learnt, measured = halves(POOLS, seed=4)
    known = {one.ids for one in learnt}
    for domain, requests in measured.items():
        assert len(requests) == len(POOLS[domain]) // 2
        assert not known & {one.ids for one in requests}
    assert routed(scene()).known == 0


def test_a_router_that_learns_pays_for_what_is_evaluated() -> None:
    world = scene(of=POOLS)
    costs = prices(world)
    run = route(world, costs, 0, learns=True)
    assert run.evaluated >= 64
    assert run.evaluating_seconds == pytest.approx(run.evaluated * 2 * costs.evaluation)
    # Until something is known, each request gets all layers of the model that reads it best.
    assert all(plan.depth == 4 for plan in run.plans[:8])
    assert {plan.depth for plan in run.plans[70:]} == {2, 4}
