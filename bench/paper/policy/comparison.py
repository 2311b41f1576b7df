"""Compares the router with the other ways to choose plans, on the same requests.

Quality is measured on the rest of each request only, for every method. The texts are halved: a router that
has learnt before has learnt from one half, and all methods serve the other one.
"""

import operator
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.paper.policy import traffic
from bench.paper.policy.hindsight import Figures, Hindsight, bound
from bench.paper.policy.paper_setting import RULE
from bench.paper.policy.prices import Prices, prices
from bench.paper.policy.routing import RoutedRun, examples, learn, route
from bench.paper.policy.simulation import Run, Scene, simulate
from bench.paper.policy.traffic import Request
from bench.systems.subject import Sizes, Subject
from bench.texts import held_out, unseen
from helios.catalog import ModelEntry
from helios.engine.evaluation.trace import trace_exits
from helios.routing.knowledge import Knowledge
from services.controller.agenda import AgendaSettings

HINDSIGHT, PAPER, SINGLE, ROUTER, ORACLE = (
    "best plan of each phase, in hindsight",
    "the paper's method",
    "single plan",
    "router",
    "oracle",
)
UNSEEN = "unseen"
# The bound on the rise of perplexity in a phase. It is wider than the bound over a trace.
PHASE_BOUND = 0.08
# Requests after which the bound is first judged on a domain that nobody has seen.
_FIRST_JUDGED = 8


@dataclass(frozen=True, slots=True)
class _Trace:
    """A trace of texts that its router has not learnt from, with what the router has learnt."""

    hindsight: Hindsight
    prices: Prices
    knowledge: Knowledge
    seed: int

    def route(self, *, knows_rest: bool = False) -> RoutedRun:
        return route(
            self.hindsight.scene, self.prices, self.seed, knowledge=self.knowledge, knows_rest=knows_rest
        )


@dataclass(frozen=True, slots=True)
class _Half:
    """The texts that one router learns from are left out."""

    pools: Mapping[str, Sequence[Request]]
    prices: Prices
    knowledge: Knowledge


def halves(
    pools: Mapping[str, Sequence[Request]], seed: int
) -> tuple[list[Request], dict[str, list[Request]]]:
    """The requests of one half of the texts, and those of the other one by domain."""
    draw = random.Random(seed)
    learnt: list[Request] = []
    measured = {}
    for domain, pool in pools.items():
        order = draw.sample(list(pool), len(pool))
        learnt += order[: len(order) // 2]
        measured[domain] = order[len(order) // 2 :]
    draw.shuffle(learnt)
    return learnt, measured


def compare(
    scene: Scene,
    pools: Mapping[str, Sequence[Request]],
    strange: Mapping[str, Sequence[Request]],
    sizes: Sizes,
) -> dict[str, Any]:
    """Simulates all methods on the standard trace, and the router on other traffic.

    scene: without requests. strange: requests of domains that nobody has seen.
    """
    scene = replace(scene, judged_from=sizes.probed_tokens)
    any_request = next(iter(pools.values()))[0]
    costs = prices(replace(scene, requests=[any_request]))
    half = [_half(scene, pools, costs, seed) for seed in range(sizes.traces)]

    def traces(shape: traffic.Shape, count: int) -> list[_Trace]:
        return [
            _trace(scene, one, traffic.trace(one.pools, shape, sizes.phase_requests, seed), seed)
            for seed, one in enumerate(half[:count])
        ]

    standard = traces(traffic.SHAPES[traffic.STANDARD], sizes.traces)
    agendas = {PAPER: AgendaSettings.model_validate(RULE), SINGLE: AgendaSettings.model_validate({})}
    rows = {
        HINDSIGHT: _row([(one.hindsight, one.hindsight.best()) for one in standard]),
        **{
            name: _row([(one.hindsight, simulate(one.hindsight.scene, settings)) for one in standard])
            for name, settings in agendas.items()
        },
        ROUTER: _routed(standard, _Trace.route),
        ORACLE: _routed(standard, lambda one: one.route(knows_rest=True)),
    }
    return {
        "judged_from": scene.judged_from,
        "first_judged": _FIRST_JUDGED,
        "phase_bound": PHASE_BOUND,
        "phase_requests": sizes.phase_requests,
        "examples": len(half[0].knowledge.features),
        "prices": {
            "reading_seconds": costs.reading,
            "layers_seconds": costs.layers,
            "loading_seconds": costs.loading,
            "evaluation_seconds": costs.evaluation,
        },
        "methods": rows,
        "learning": {
            str(len(traffic.SHAPES[traffic.STANDARD]) * requests): _learning(
                scene, pools, costs, requests, count
            )
            for requests, count in (
                (sizes.phase_requests, sizes.few_traces),
                (sizes.learning_phase_requests, sizes.learning_traces),
            )
        },
        "shapes": {
            name: _routed(traces(shape, sizes.few_traces), _Trace.route)
            for name, shape in traffic.SHAPES.items()
            if name != traffic.STANDARD
        },
        "steady": {
            name: _routed(traces(shape, sizes.few_traces), _Trace.route)
            for name, shape in traffic.STEADY.items()
        },
        UNSEEN: _unseen(scene, half[: sizes.few_traces], strange),
    }


def record_unseen(subject: Subject, candidates: Sequence[ModelEntry]) -> dict[str, list[Request]]:
    """Requests of domains that no candidate has seen, by domain."""
    tokenizer, sizes = subject.tokenizers[candidates[0].name], subject.sizes
    found = {}
    for domain, text in unseen.texts().items():
        ids, length = tokenizer.encode(text).ids, sizes.request_tokens + 1
        windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        windows = windows[: sizes.unseen_requests]
        subject.say(f"every exit on text that no candidate has seen: {domain}")
        traces = {model.name: trace_exits(subject.plan(model), windows) for model in candidates}
        found[domain] = traffic.cut(subject, domain, windows, traces)
    return found


def _half(scene: Scene, pools: Mapping[str, Sequence[Request]], costs: Prices, seed: int) -> _Half:
    learnt, measured = halves(pools, seed)
    return _Half(measured, costs, learn(examples(learnt, scene.judged_from), scene, costs))


def _trace(scene: Scene, half: _Half, requests: Sequence[Request], seed: int) -> _Trace:
    return _Trace(Hindsight(replace(scene, requests=requests)), half.prices, half.knowledge, seed)


def _learning(
    scene: Scene, pools: Mapping[str, Sequence[Request]], costs: Prices, phase_requests: int, count: int
) -> dict[str, Any]:
    """The standard trace, served by a router that knows nothing at first."""
    worlds = [
        Hindsight(
            replace(
                scene,
                requests=traffic.trace(pools, traffic.SHAPES[traffic.STANDARD], phase_requests, seed),
            )
        )
        for seed in range(count)
    ]
    return _with_routing(
        [(one, route(one.scene, costs, seed, learns=True)) for seed, one in enumerate(worlds)]
    )


def _unseen(scene: Scene, half: Sequence[_Half], strange: Mapping[str, Sequence[Request]]) -> dict[str, Any]:
    """Traffic of domains that no router has learnt, after prose, by domain."""
    (prose, *_) = held_out.DOMAINS
    found = {}
    for domain, requests in strange.items():
        rows = []
        for seed, one in enumerate(half):
            before = one.pools[prose]
            rows.append(_from_first(_trace(scene, one, [*before, *requests], seed), len(before)))
        found[domain] = {
            "traces": len(rows),
            "requests": len(requests),
            "safe_share": statistics.fmean(row["safe_share"] for row in rows),
            "best_model_share": statistics.fmean(row["best_model_share"] for row in rows),
            "perplexity_increase": statistics.fmean(row["perplexity_increase"] for row in rows),
            "largest_increase_so_far": max(row["largest_increase_so_far"] for row in rows),
            "time_to_safe": statistics.fmean(row["time_to_safe"] for row in rows),
        }
    return found


def _from_first(trace: _Trace, start: int) -> dict[str, float]:
    """Figures of the requests from `start` on, over the best candidate with all layers."""
    scene = trace.hindsight.scene
    run = trace.route()
    requests, plans = scene.requests[start:], run.plans[start:]
    whole = [one.full.depth for one in scene.profiles.values()]

    def nats(request: Request, model: str, depth: int) -> float:
        record = request.records[model]
        rest = record.nats[record.exit_layers.index(depth), scene.judged_from :]
        return float(rest.sum(dtype=np.float64))

    served = np.array([nats(one, plan.model, plan.depth) for one, plan in zip(requests, plans, strict=True)])
    by_model = {
        model: np.array([nats(one, model, depth) for one in requests])
        for model, depth in zip(scene.profiles, whole, strict=True)
    }
    best = min(by_model, key=lambda model: float(by_model[model].sum()))
    tokens = np.array([one.records[plans[0].model].tokens - scene.judged_from for one in requests])
    so_far = np.expm1((served - by_model[best]).cumsum() / tokens.cumsum())
    safe = [plan.model_copy(update={"depth": scene.profiles[plan.model].full.depth}) for plan in plans]
    return {
        "safe_share": statistics.fmean(map(operator.eq, plans, safe)),
        "best_model_share": statistics.fmean(plan.model == best for plan in plans),
        "perplexity_increase": float(so_far[-1]),
        "largest_increase_so_far": float(so_far[min(_FIRST_JUDGED, len(so_far)) - 1 :].max()),
        "time_to_safe": sum(map(scene.token_seconds, plans)) / sum(map(scene.token_seconds, safe)),
    }


def _routed(traces: Sequence[_Trace], run: Callable[[_Trace], RoutedRun]) -> dict[str, Any]:
    return _with_routing([(one.hindsight, run(one)) for one in traces])


def _with_routing(runs: Sequence[tuple[Hindsight, RoutedRun]]) -> dict[str, Any]:
    requests = sum(len(run.plans) for _, run in runs)
    found = [run for _, run in runs]
    return {
        **_row(runs),
        "loading_share": sum(run.moving_seconds for run in found) / sum(run.seconds for run in found),
        "probing_share": sum(run.probing_seconds for run in found) / sum(run.seconds for run in found),
        "read_by_all_share": sum(run.read_by_all for run in found) / requests,
        "safe_share": sum(run.safe for run in found) / requests,
        "known_share": sum(run.known for run in found) / requests,
        "evaluated": sum(run.evaluated for run in found) / len(found),
        "ranking_seconds": sum(run.ranking_seconds for run in found) / requests,
        "settling_seconds": sum(run.settling_seconds for run in found)
        / max(sum(run.settlements for run in found), 1),
    }


def _row(runs: Sequence[tuple[Hindsight, Run]]) -> dict[str, Any]:
    figures: list[Figures] = [hindsight.figures(run) for hindsight, run in runs]
    return {
        "traces": len(figures),
        **{
            name: statistics.fmean(getattr(one, name) for one in figures)
            for name in ("tokens_per_second", "time_to_best", "priced_time_to_best", "perplexity_increase")
        },
        "largest_perplexity_increase": max(one.perplexity_increase for one in figures),
        "worst_phase_increase": max(one.worst_phase_increase for one in figures),
        "held": sum(one.perplexity_increase <= bound() for one in figures),
        "held_in_each_phase": sum(one.worst_phase_increase <= bound() for one in figures),
        "within_phase_bound": sum(one.worst_phase_increase <= PHASE_BOUND for one in figures),
        "times": [one.time_to_best for one in figures],
    }
