"""Simulates the router on recorded requests, with the package that workers and the controller use.

A request's beginning is what a probe would read of its prompt, and the rest is what its plan then predicts.
Requests come one after the other. An evaluation is there some requests later.
"""

import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.paper.policy.hindsight import bound
from bench.paper.policy.prices import Prices
from bench.paper.policy.simulation import Run, Scene
from bench.paper.policy.traffic import Request
from helios.routing.example import Example
from helios.routing.knowledge import Knowledge
from helios.routing.probe import PROBE_READINGS, ExitReading, Probe, evenly_spread, read_positions
from helios.routing.router import Router
from helios.routing.terms import Recent, Terms, settle
from helios.routing.unlike_prompts import UnlikePrompts
from helios.served import ServedPlan
from helios.settings import SERVED_PROMPT_READINGS
from services.controller.agenda import AgendaSettings
from services.controller.allowance import Allowance
from services.controller.routing.learning import Learning
from services.controller.routing.recent_prompts import Seen
from services.controller.routing.settings import RoutingSettings

# Requests between two settlements, and those that a settlement sees.
SETTLED_REQUESTS = 8
_RECENT_REQUESTS = 64
# Requests until an evaluation is there.
_EVALUATION_DELAY = 4
_SETTINGS = RoutingSettings.model_validate({})
_PROFILING_SHARE: float = AgendaSettings.model_fields["profiling_share"].default


@dataclass(slots=True)
class RoutedRun(Run):
    """The record of a simulated router. Loading counts as moving."""

    probing_seconds: float = 0.0
    # Requests that were read under all models, that got the safe plan, and that were evaluated.
    read_by_all: int = 0
    safe: int = 0
    evaluated: int = 0
    # Requests that were examples when they came, since texts repeat.
    known: int = 0
    ranking_seconds: float = 0.0
    settling_seconds: float = 0.0
    settlements: int = 0


@dataclass(frozen=True, slots=True)
class _Routed:
    """A request that was routed. nats: readings by model. served_nats: of the rest, where workers read it."""

    first_ids: tuple[int, ...]
    nats: dict[str, float]
    plan: ServedPlan
    served_nats: float
    served_tokens: int


def examples(requests: Sequence[Request], first_tokens: int) -> list[Example]:
    """What evaluations of these requests under every model would give."""
    return [_example(one, first_tokens) for one in requests]


def learn(found: Sequence[Example], scene: Scene, prices: Prices) -> Knowledge:
    """What a router learns from examples."""
    depths = {name: [one.depth for one in profile.exits] for name, profile in scene.profiles.items()}
    return Knowledge.learn(found, prices.plans, depths, prices.probe, prices.tokens)


def route(
    scene: Scene,
    prices: Prices,
    seed: int,
    *,
    knowledge: Knowledge | None = None,
    learns: bool = False,
    knows_rest: bool = False,
) -> RoutedRun:
    """Serves the requests of a scene, each under the plan that a router chooses.

    knowledge: what has been learnt before. learns: the router learns while it serves, when the controller
    would have requests evaluated. Until it has learnt, each request gets all layers of the model that reads
    its beginning best. seed: of the lots.
    knows_rest: an oracle, which knows the nats of the rest and needs no probe. Its price is settled as a
    router's.
    """
    return _Routing(scene, prices, seed, knowledge, learns, knows_rest).run()


class _Routing:
    def __init__(
        self,
        scene: Scene,
        prices: Prices,
        seed: int,
        knowledge: Knowledge | None,
        learns: bool,
        knows_rest: bool,
    ) -> None:
        self.scene, self.prices, self.knows_rest = scene, prices, knows_rest
        self.plans = [one.plan for one in prices.plans]
        self.lots = random.Random(seed)
        self.done = RoutedRun(seconds=prices.loading, moving_seconds=prices.loading)
        allowance = Allowance(_PROFILING_SHARE, lambda: self.done.seconds)
        self.learning = Learning(_SETTINGS.routing_growth, allowance) if learns else None
        self.knowledge = _omniscient(knowledge) if knowledge is not None and knows_rest else knowledge
        self.router: Router | None = None
        self.examples: dict[str, Example] = {}
        # Evaluations that are under way: when they are there, and what they give.
        self.under_way: deque[tuple[int, list[Example]]] = deque()
        self.routed: deque[_Routed] = deque(maxlen=_RECENT_REQUESTS)
        # The same requests as the present knowledge sees them.
        self.recent: deque[Recent] = deque(maxlen=_RECENT_REQUESTS)
        self.unlike = UnlikePrompts()
        if self.knowledge is not None:
            self._settle(self.knowledge)

    def run(self) -> RoutedRun:
        for number, request in enumerate(self.scene.requests):
            self._serve(request)
            has_learnt = self.learning is not None and self._learn(self.learning, number)
            is_due = number % SETTLED_REQUESTS == SETTLED_REQUESTS - 1
            if self.knowledge is not None and (has_learnt or is_due):
                self._settle(self.knowledge)
        return self.done

    def _serve(self, request: Request) -> None:
        done, scene = self.done, self.scene
        first_tokens = scene.judged_from
        first_ids = _first_ids(request, first_tokens)
        readings = {model: _reading(request, model, first_tokens, PROBE_READINGS) for model in scene.profiles}
        is_read_whole = False
        is_safe = True
        if self.router is None:
            best = min(readings, key=lambda model: readings[model].nats)
            plan = ServedPlan(model=best, depth=scene.profiles[best].full.depth)
        elif self.knows_rest:
            plan, is_safe = self._best(request, self.router), False
        else:
            began = time.perf_counter()
            lot, router = self.lots.random(), self.router
            model = router.first_model(first_ids)
            first = {model: readings[model]}
            probe = Probe(first_tokens, first, first_ids)
            ranked = router.rank(probe, lot=lot, is_complete=len(first) == len(readings), unlike=self.unlike)
            if ranked is None:
                probe = Probe(first_tokens, readings, first_ids)
                ranked = router.rank(probe, lot=lot, is_complete=False, unlike=self.unlike)
            else:
                readings = first
            if ranked is None:
                is_read_whole = True
                readings = {
                    model: _reading(request, model, first_tokens, first_tokens) for model in scene.profiles
                }
                probe = Probe(first_tokens, readings, first_ids)
                ranked = router.rank(probe, lot=lot, is_complete=True, unlike=self.unlike)
            done.ranking_seconds += time.perf_counter() - began
            assert ranked is not None
            plan = ranked[0].plan
            is_safe = "safe plan" in ranked[0].reason
            nats = {model: one.nats for model, one in readings.items()}
            self.unlike.add(nats if ranked[0].is_unlike else None)
        record = request.records[plan.model]
        rest = record.nats[record.exit_layers.index(plan.depth), first_tokens:]
        # What is read of a prompt that was taken for no other says nothing about what was expected.
        count = 0 if is_safe else min(len(rest), SERVED_PROMPT_READINGS)
        read = evenly_spread(count, len(rest))
        served_nats = float(rest[read].mean(dtype=np.float64)) if read else 0.0
        nats = {model: one.nats for model, one in readings.items()}
        self.routed.append(_Routed(first_ids, nats, plan, served_nats, len(read)))
        if self.knowledge is not None:
            seen = self._see(self.knowledge, self.routed[-1])
            if self.learning is not None:
                self.learning.saw([seen])
        done.plans.append(plan)
        probing = 0.0 if self.knows_rest else self.prices.probing(set(readings), plan)
        if is_read_whole:
            probing += self.prices.whole
        done.probing_seconds += probing
        done.seconds += record.tokens * scene.token_seconds(plan) + probing
        done.read_by_all += len(readings) == len(scene.profiles)
        done.safe += is_safe
        done.known += _name(request) in self.examples
        done.nats += float(rest.sum(dtype=np.float64))
        done.tokens += record.tokens
        done.text_bytes += record.text_bytes

    def _best(self, request: Request, router: Router) -> ServedPlan:
        terms = router.terms
        price = terms.low_price if self.lots.random() < terms.low_share else terms.price
        nats = rest_nats(request, self.plans, self.scene.judged_from)
        return self.plans[int((router.knowledge.costs + price * nats).argmin())]

    def _see(self, knowledge: Knowledge, routed: _Routed) -> Seen:
        found = Recent.of(
            knowledge, routed.first_ids, routed.nats, routed.plan, routed.served_nats, routed.served_tokens
        )
        if self.knows_rest:
            # What a probe would have shown means nothing to it.
            found = Recent(found.features, found.first)
        self.recent.append(found)
        return Seen(found.is_unlike, knowledge.models[knowledge.kind(found.features, found.first)])

    def _learn(self, learning: Learning, number: int) -> bool:
        """Begins evaluations that are due, and takes those that are there. Returns whether one was."""
        done, knowledge = self.done, self.knowledge
        of_kind: dict[str, int] = {}
        if knowledge is not None:
            of_kind = dict(Counter(knowledge.models[at] for at in knowledge.best_models.tolist()))
        due = None if self.under_way else learning.due(number + 1, done.seconds, len(self.examples), of_kind)
        if due is not None:
            newest = self.scene.requests[max(0, number + 1 - (due.requests or 0)) : number + 1]
            found = examples(newest, self.scene.judged_from)
            self.under_way.append((number + _EVALUATION_DELAY, found))
            learning.began(number + 1, done.seconds)
            done.evaluated += len(found)
            done.assessments += 1
            done.evaluating_seconds += len(found) * len(self.scene.profiles) * self.prices.evaluation
        if not self.under_way or self.under_way[0][0] > number:
            return False
        found = self.under_way.popleft()[1]
        learning.ended(
            len(found) * len(self.scene.profiles) * self.prices.evaluation, threads=1, failed=False
        )
        for one in found:
            # A repeated request tells nothing new, but it is among the newest again.
            self.examples.pop(one.id, None)
            self.examples[one.id] = one
        self.examples = dict(list(self.examples.items())[-_SETTINGS.routing_examples :])
        if len(self.examples) < _SETTINGS.routing_least_examples:
            return False
        self.knowledge = learn(list(self.examples.values()), self.scene, self.prices)
        self.recent.clear()
        for routed in self.routed:
            self._see(self.knowledge, routed)
        return True

    def _settle(self, knowledge: Knowledge) -> None:
        began = time.perf_counter()
        terms: Terms = settle(knowledge, list(self.recent), bound() * _SETTINGS.bound_share)
        self.router = Router(number=1, knowledge=knowledge, terms=terms)
        self.done.settling_seconds += time.perf_counter() - began
        self.done.settlements += 1


def rest_nats(request: Request, plans: Sequence[ServedPlan], first_tokens: int) -> NDArray[np.float64]:
    """Mean nats of a request's rest under each plan."""
    records = [request.records[plan.model] for plan in plans]
    return np.array(
        [
            record.nats[record.exit_layers.index(plan.depth), first_tokens:].mean(dtype=np.float64)
            for record, plan in zip(records, plans, strict=True)
        ]
    )


def _omniscient(knowledge: Knowledge) -> Knowledge:
    """Knowledge whose expectations are the true nats of its examples, and whose probes are free."""
    return Knowledge.model_validate(
        {
            **knowledge.model_dump(),
            "probe": {"first_seconds": 0.0, "further_seconds": 0.0},
            "expected": knowledge.nats,
            "first_expected": (knowledge.nats,) * len(knowledge.models),
        }
    )


def _example(request: Request, first_tokens: int) -> Example:
    records = request.records
    return Example(
        id=_name(request),
        ids=(request.before, *request.ids),
        first_tokens=first_tokens,
        first_nats={model: _reading(request, model, first_tokens, PROBE_READINGS).nats for model in records},
        rest_nats={
            model: tuple(one.nats[:, first_tokens:].mean(axis=1, dtype=np.float64).tolist())
            for model, one in records.items()
        },
        token_nats={model: tuple(one.nats[-1].tolist()) for model, one in records.items()},
    )


def _name(request: Request) -> str:
    return str(hash((request.before, request.ids)))


def _first_ids(request: Request, first_tokens: int) -> tuple[int, ...]:
    return (request.before, *request.ids[: first_tokens - 1])


def _reading(request: Request, model: str, first_tokens: int, most: int) -> ExitReading:
    record = request.records[model]
    # Position 0 is the token before the request, so position n predicts its n-th token.
    read = read_positions(first_tokens, most)
    return ExitReading(
        depth=record.exit_layers[0],
        tokens=len(read),
        nats=float(record.nats[0, read].mean(dtype=np.float64)),
        doubt=-float(np.log(record.confidences[0, read]).mean(dtype=np.float64)),
    )
