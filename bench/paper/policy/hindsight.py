"""A simulated trace compared with hindsight: every fixed plan, and the best plan of each phase."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.paper.policy.simulation import POOLED_REQUESTS, Run, Scene, simulate
from helios.served import ServedPlan
from helios.slo import Slo
from services.controller.agenda import AgendaSettings

# Some requests are served before a drift is noticed. So in one phase perplexity may rise by this many times
# the bound. Over a whole trace it may rise by the bound only.
PHASE_FACTOR = 2.0


def bound() -> float:
    """The default bound on the rise of perplexity, as a share, over the best candidate with all layers."""
    found = Slo().max_perplexity_increase
    assert found is not None
    return found


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one simulation of a trace. Times are ratios. Increases of perplexity are shares."""

    tokens_per_second: float
    time_to_best: float
    """Time with moves, divided by the time of each phase's fastest plan within the bound, without moves."""
    priced_time_to_best: float
    """The same, with the CPU time of evaluations added."""
    perplexity_increase: float
    phase_increases: dict[str, float]
    moves: int
    needless_moves: int
    """Moves, except the first, from a plan within the bound to one that is not faster or not within it."""
    alarms: int
    """Number of alarms: drifts that were noticed, rightly or not."""
    evaluations: int
    alarmed: list[int]
    """The requests at which a drift was noticed."""
    moved: list[dict[str, Any]]
    drifts: list[dict[str, Any]]
    """For each change of phase: whether the plan had to change, and when a plan within the bound served."""

    @property
    def worst_phase_increase(self) -> float:
        """The rise of perplexity in the worst phase."""
        return max(self.phase_increases.values())

    @property
    def is_within_bound(self) -> bool:
        """Whether the whole trace is within the bound, and every phase within PHASE_FACTOR of it."""
        return self.perplexity_increase <= bound() and self.worst_phase_increase <= PHASE_FACTOR * bound()

    @property
    def reactions(self) -> list[int | None]:
        """For each drift that needs a move: requests until a plan within the bound served; None: never."""
        return [drift["requests_until_within_bound"] for drift in self.drifts if drift["needs_move"]]


def summary(traces: Sequence[Figures]) -> dict[str, Any]:
    """Several traces as one row. Figures are means, unless the name says otherwise."""

    def mean(name: str) -> float:
        return statistics.fmean(getattr(one, name) for one in traces)

    return {
        "traces": len(traces),
        "within_bound": sum(one.is_within_bound for one in traces),
        **{
            name: mean(name)
            for name in (
                "tokens_per_second",
                "time_to_best",
                "priced_time_to_best",
                "perplexity_increase",
                "moves",
                "needless_moves",
                "alarms",
                "evaluations",
            )
        },
        "largest_perplexity_increase": max(one.perplexity_increase for one in traces),
        "worst_phase_increase": max(one.worst_phase_increase for one in traces),
        "reactions": [reaction for one in traces for reaction in one.reactions],
    }


@dataclass(frozen=True, slots=True)
class _Phase:
    name: str
    start: int
    end: int
    # All tokens, and those that quality is measured on.
    tokens: int
    judged_tokens: int
    # For every plan, if it serves the whole phase.
    seconds: Mapping[ServedPlan, float]
    nats: Mapping[ServedPlan, float]
    best_nats: float
    """Nats of the best candidate with all layers."""

    def increase(self, nats: float) -> float:
        return math.expm1((nats - self.best_nats) / self.judged_tokens)

    @property
    def within(self) -> set[ServedPlan]:
        """The plans within the bound in this phase. The best candidate with all layers always is."""
        return {plan for plan, nats in self.nats.items() if self.increase(nats) <= bound()}


class Hindsight:
    """Knows how every plan would have served a trace."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        profiles = scene.profiles.values()
        plans = [
            ServedPlan(model=profile.model, depth=one.depth) for profile in profiles for one in profile.exits
        ]
        self._rows = {plan: row for row, plan in enumerate(plans)}
        # Nats of each request under each plan: [plans, requests].
        self._nats = np.stack([_nats_by_request(scene, plan) for plan in plans])
        self._phases = list(self._split(plans))

    def _split(self, plans: Sequence[ServedPlan]) -> Iterator[_Phase]:
        whole = {ServedPlan(model=one.model, depth=one.full.depth) for one in self.scene.profiles.values()}
        token_seconds = {plan: self.scene.token_seconds(plan) for plan in plans}
        start = 0
        for name, group in itertools.groupby(self.scene.requests, key=lambda request: request.phase):
            requests = list(group)
            end = start + len(requests)
            tokens = sum(request.records[plans[0].model].tokens for request in requests)
            nats = {plan: float(self._nats[row, start:end].sum()) for plan, row in self._rows.items()}
            yield _Phase(
                name=name,
                start=start,
                end=end,
                tokens=tokens,
                judged_tokens=tokens - len(requests) * self.scene.judged_from,
                seconds={plan: tokens * token_seconds[plan] for plan in plans},
                nats=nats,
                best_nats=min(nats[plan] for plan in whole),
            )
            start = end

    @property
    def best_seconds(self) -> float:
        """Seconds of the fastest plan within the bound, over all phases."""
        return self.best().seconds

    def best(self) -> Run:
        """A run under the fastest plan of each phase that is within the bound, without moves."""
        run = Run()
        for phase in self._phases:
            plan = min(phase.within, key=lambda plan: phase.seconds[plan])
            run.plans += [plan] * (phase.end - phase.start)
            run.seconds += phase.seconds[plan]
            run.tokens += phase.tokens
        return run

    @property
    def _judged_tokens(self) -> int:
        return sum(phase.judged_tokens for phase in self._phases)

    def fixed_plans(self) -> list[dict[str, Any]]:
        """The figures of every plan, if it serves from the first request to the last."""
        tokens = sum(phase.tokens for phase in self._phases)
        rows = []
        for plan in self._rows:
            seconds = sum(phase.seconds[plan] for phase in self._phases)
            excess = sum(phase.nats[plan] - phase.best_nats for phase in self._phases)
            rows.append(
                {
                    "model": plan.model,
                    "depth": plan.depth,
                    "tokens_per_second": tokens / seconds,
                    "time_to_best": seconds / self.best_seconds,
                    "perplexity_increase": math.expm1(excess / self._judged_tokens),
                    "worst_phase_increase": max(phase.increase(phase.nats[plan]) for phase in self._phases),
                }
            )
        return rows

    def figures(self, run: Run) -> Figures:
        """The figures of a simulation of the trace."""
        served = self._nats[[self._rows[plan] for plan in run.plans], np.arange(len(run.plans))]
        best_nats = sum(phase.best_nats for phase in self._phases)
        return Figures(
            tokens_per_second=run.tokens / run.seconds,
            time_to_best=run.seconds / self.best_seconds,
            priced_time_to_best=run.priced_seconds / self.best_seconds,
            perplexity_increase=math.expm1((float(served.sum()) - best_nats) / self._judged_tokens),
            phase_increases={
                phase.name: phase.increase(float(served[phase.start : phase.end].sum()))
                for phase in self._phases
            },
            moves=len(run.moves),
            needless_moves=sum(self._is_needless(move) for move in run.moves[1:]),
            alarms=len(run.alarms),
            evaluations=run.assessments,
            alarmed=run.alarms,
            moved=run.moves,
            drifts=[self._drift(run, before, phase) for before, phase in itertools.pairwise(self._phases)],
        )

    def _is_needless(self, move: Mapping[str, Any]) -> bool:
        phase = next(phase for phase in self._phases if move["request"] < phase.end)
        named = {str(plan): plan for plan in self._rows}
        before, after = named[move["from"]], named[move["to"]]
        is_slower = phase.seconds[after] >= phase.seconds[before]
        return before in phase.within and (is_slower or after not in phase.within)

    def _drift(self, run: Run, earlier: _Phase, phase: _Phase) -> dict[str, Any]:
        before = run.plans[earlier.end - 1]

        def until(requests: Sequence[int]) -> int | None:
            return next((one - phase.start for one in requests if phase.start <= one < phase.end), None)

        within = [number for number in range(phase.start, phase.end) if run.plans[number] in phase.within]
        return {
            "request": phase.start,
            "phase": phase.name,
            "plan_before": str(before),
            "perplexity_increase_if_kept": phase.increase(phase.nats[before]),
            "needs_move": before not in phase.within,
            "requests_until_alarm": until(run.alarms),
            "requests_until_move": until([move["request"] for move in run.moves]),
            "requests_until_within_bound": until(within),
        }


def _nats_by_request(scene: Scene, plan: ServedPlan) -> NDArray[np.float64]:
    records = [request.records[plan.model] for request in scene.requests]
    index = records[0].exit_layers.index(plan.depth)
    return np.array([record.nats[index, scene.judged_from :].sum(dtype=np.float64) for record in records])


def simulated(
    traces: Sequence[Hindsight],
    settings: AgendaSettings,
    *,
    threshold: float | None = None,
    profiled_requests: int | None = None,
    pooled_requests: int = POOLED_REQUESTS,
) -> dict[str, Any]:
    """Simulates the traces with these settings. Returns one row. The arguments are those of `simulate`."""
    return summary(
        [
            one.figures(
                simulate(one.scene, settings, threshold, profiled_requests, pooled_requests=pooled_requests)
            )
            for one in traces
        ]
    )
