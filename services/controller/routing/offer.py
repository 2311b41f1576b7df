"""Finds the sets of plans that a router should choose from, and what would come of it. Pure."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from helios.history import ModelProfile
from helios.routing.example import Example
from helios.routing.knowledge import Knowledge
from helios.routing.terms import Recent
from helios.served import ServedPlan
from helios.slo import Objective, Slo
from services.controller.policy.options import most_sequences
from services.controller.policy.sets import Sets
from services.controller.policy.settings import PolicySettings
from services.controller.routing.costs import plan_cost
from services.controller.routing.expectation import Demand, Expectation, expect, learn
from services.controller.routing.plan_sets import Layout, choose_set, is_refused, layouts_of, refit
from services.controller.situation import Bar, WorkerView

_OBJECTIVES = (Objective.THROUGHPUT, Objective.LATENCY)
# Bounds that a router does not know of.
_OTHER_BOUNDS = ("min_agreement", "max_ttft_seconds", "max_tpot_seconds")


@dataclass(frozen=True, slots=True)
class Question:
    """What is known when sets are looked for.

    workers: those that are not pinned. in_force: their sets. refused: sets that a worker could not load.
    recent: the last routed requests, as a knowledge sees them.
    """

    examples: Sequence[Example]
    profiles: Mapping[str, ModelProfile]
    workers: Sequence[WorkerView]
    demand: Demand
    in_force: Sets
    bound: float
    min_gain: float
    recent: Callable[[Knowledge], Sequence[Recent]]
    refused: Collection[frozenset[ServedPlan]] = ()
    bars: Sequence[Bar] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The best sets, and what is expected of them and of those in force, by all of their plans."""

    best: Expectation | None = None
    expected: Mapping[frozenset[ServedPlan], Expectation] = field(default_factory=dict)


def why_single(slo: Slo, settings: PolicySettings) -> str:
    """Why a router cannot serve this SLO, in words. Empty if it can."""
    if slo.objective not in _OBJECTIVES:
        return f"a router does not serve the objective {slo.objective}"
    if slo.max_perplexity_increase is None:
        return "a router needs a bound on perplexity"
    bounds: Iterable[str] = (name for name in _OTHER_BOUNDS if getattr(slo, name) is not None)
    named = [*bounds, *(["min_exit_share"] if settings.min_exit_share is not None else [])]
    return f"a router does not keep {' and '.join(named)}" if named else ""


def find_sets(asked: Question) -> Answer:
    """Looks for the best sets. Those in force stay unless others are better by `min_gain`."""
    demand, profiles = asked.demand, list(asked.profiles.values())
    context = demand.prompt_tokens + demand.output_tokens / 2
    alone = _single_seconds(asked, context)
    found: dict[tuple[frozenset[ServedPlan], int], Expectation] = {}

    def expected(layout: Layout) -> Expectation:
        key = (layout.union, layout.batch)
        if key not in found:
            knowledge = learn(asked.examples, layout, asked.profiles, demand)
            found[key] = expect(knowledge, layout, asked.recent(knowledge), asked.bound, alone)
        return found[key]

    def barred(profile: ModelProfile, depth: int) -> bool:
        return any(bar.covers(profile, depth) for bar in asked.bars)

    current = refit(asked.in_force, profiles, asked.workers, context) if asked.in_force else None
    if current is not None and is_refused(current, asked.refused):
        current = None
    now = None if current is None else expected(current)
    layouts = layouts_of(
        profiles,
        asked.workers,
        demand.prompt_tokens,
        demand.output_tokens,
        None if now is None else now.shares,
        barred,
    )
    chosen = choose_set(layouts, expected, lambda one: one.terms.seconds, asked.refused)
    best = None if chosen is None else chosen[1]
    if now is not None and best is not None and now.layout.union != best.layout.union:
        is_better = best.terms.seconds < (1 - asked.min_gain) * now.terms.seconds
        best = best if is_better else now
    by_plans = {one.layout.union: one for one in found.values()}
    # Of two with the same plans, the one in force counts.
    if now is not None:
        by_plans[now.layout.union] = now
    return Answer(best, by_plans)


def _single_seconds(asked: Question, context: float) -> dict[ServedPlan, float]:
    """Seconds of a token under each plan if all workers serve it alone."""
    demand, found = asked.demand, {}
    for profile in asked.profiles.values():
        for one in profile.exits:
            batch = min(
                most_sequences(worker, one.weight_bytes, one.kv_bytes_per_token * context)
                for worker in asked.workers
            )
            plan = ServedPlan(model=profile.model, depth=one.depth)
            found[plan] = plan_cost(
                profile,
                plan,
                batch=batch,
                load=demand.load,
                prompt_tokens=demand.prompt_tokens,
                output_tokens=demand.output_tokens,
                objective=demand.objective,
            ).seconds
    return found
