"""Simulates the controller on recorded requests: its own agenda and policy, without services.

Simulated time is the number of tokens times the measured time of a step, plus the cost of every move. So a
sweep is cheap, and all its settings see the same tokens. Requests come one after the other. The result of an
evaluation is there at once. Its CPU time is added to the price, not to the time.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.paper.policy import traffic
from bench.paper.policy.traffic import Request
from helios.calibration import TARGET_AGREEMENT
from helios.drift import pooled
from helios.engine.scheduling.prompt_readings import read_positions
from helios.history import ModelProfile
from helios.served import ServedPlan
from helios.settings import SERVED_PROMPT_READINGS
from helios.slo import Slo
from services.controller.agenda import Agenda, AgendaSettings, Decide, Evaluate, Outlook
from services.controller.allowance import Allowance
from services.controller.policy.decide import decide
from services.controller.situation import Bar, Situation, Trigger, WorkerView
from services.controller.traffic_watch import Served
from services.profiler.settings import ProfilerSettings

POOLED_REQUESTS: int = ProfilerSettings.model_fields["pooled_requests"].default
FRESH_POOLED_REQUESTS: int = ProfilerSettings.model_fields["fresh_pooled_requests"].default
# Most actions that can be due at one request: an evaluation, the decision on it, and their consequences.
_MOST_DUE = 6


@dataclass(frozen=True, slots=True)
class Scene:
    """The data that all simulations of a trace share."""

    requests: Sequence[Request]
    profiles: Mapping[str, ModelProfile]
    # By model and depth: the threshold for unsure tokens that the engine uses until a plan is chosen.
    thresholds: Mapping[str, Mapping[int, float]]
    # By model: seconds of a step at batch 1 that leaves at each exit. The step also reads the earlier exits
    # and fills the KV of the later layers.
    dynamic_step_seconds: Mapping[str, Sequence[float]]
    batch: int
    profiled_requests: int
    prompt_tokens: int
    # CPU seconds to evaluate one request under one model: with a continuation, and without.
    evaluation_seconds: float = 0.0
    prompt_evaluation_seconds: float = 0.0
    # CPU seconds of one request under one model, for a router to learn from.
    router_evaluation_seconds: float = 0.0
    # Seconds of a row of the LM head, when a probe's rows are read at once.
    row_seconds: float = 0.0
    # Quality is measured on each request's tokens from this one on. A probe reads those before.
    judged_from: int = 0

    def token_seconds(self, plan: ServedPlan) -> float:
        """Seconds per generated token of a saturated engine, including the token's share of the prefill."""
        one = self.profiles[plan.model].at(plan.depth)
        output = self.requests[0].records[plan.model].tokens
        share = self.prompt_tokens / output
        return one.step_seconds(self.batch) / self.batch + share / one.prefill_tokens_per_second


@dataclass(slots=True)
class Run:
    """The record of a simulation."""

    plans: list[ServedPlan] = field(default_factory=list)
    # Time for serving and moves, without evaluations.
    seconds: float = 0.0
    moving_seconds: float = 0.0
    evaluating_seconds: float = 0.0
    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    deciding_seconds: float = 0.0
    assessments: int = 0
    # The requests at which a drift was noticed.
    alarms: list[int] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nats_per_byte(self) -> float:
        """Cross-entropy over all traffic."""
        return self.nats / self.text_bytes

    @property
    def priced_seconds(self) -> float:
        """Seconds including the CPU time of evaluations."""
        return self.seconds + self.evaluating_seconds


def simulate(
    scene: Scene,
    settings: AgendaSettings,
    threshold: float | None = None,
    profiled_requests: int | None = None,
    *,
    pooled_requests: int = POOLED_REQUESTS,
) -> Run:
    """Runs the controller's loop over the recorded requests.

    threshold: the same for every exit; None: calibrated thresholds. profiled_requests: number of recent
    requests that a regular evaluation runs; None: as the scene says. pooled_requests: number of evaluated
    requests that count.
    """
    return _Simulation(scene, settings, threshold, profiled_requests, pooled_requests).run()


class _Simulation:
    def __init__(
        self,
        scene: Scene,
        settings: AgendaSettings,
        threshold: float | None,
        profiled_requests: int | None,
        pooled_requests: int,
    ) -> None:
        self.scene, self.settings, self.fixed_threshold = scene, settings, threshold
        self.sample = profiled_requests or scene.profiled_requests
        self.pooled_requests = pooled_requests
        self.done = Run()
        self.agenda = Agenda(settings, Allowance(settings.profiling_share, lambda: self.done.seconds))
        self.window: deque[bool] = deque(maxlen=settings.window_tokens)
        self.history: dict[str, ModelProfile] = {}
        first = next(iter(scene.profiles.values()))
        # Before anything is known, the first candidate serves with all layers.
        self.plan = ServedPlan(model=first.model, depth=first.full.depth)
        self.chosen: ServedPlan | None = None
        self.bars: tuple[Bar, ...] = ()
        self.moved_at: int | None = None
        self.threshold = 0.0

    def run(self) -> Run:
        for number, request in enumerate(self.scene.requests):
            for _ in range(_MOST_DUE):
                seen = self._outlook(number)
                due = self.agenda.due(seen)
                if isinstance(due, Evaluate):
                    self._evaluate(due, seen)
                elif isinstance(due, Decide):
                    self._decide(due, seen, request)
                else:
                    break
            self._serve(request)
        return self.done

    def _outlook(self, number: int) -> Outlook:
        return Outlook(
            now=self.done.seconds,
            finished=number,
            workers=(self._view(),),
            history=self.history,
            history_times={name: profile.time for name, profile in self.history.items()},
            can_evaluate=True,
            evaluating=False,
            moving=False,
        )

    def _evaluate(self, due: Evaluate, seen: Outlook) -> None:
        number, count = seen.finished, due.requests or self.sample
        self.agenda.evaluation_began(due, seen)
        if due.fresh:
            self.done.alarms.append(number)
        # Before the first request there are no recent ones, so the first requests are evaluated.
        recent = self.scene.requests[max(0, number - count) : number] or self.scene.requests[:count]
        names = due.models or tuple(self.scene.profiles)
        for name in names:
            now = traffic.profile(self.scene.profiles[name], recent, float(number), self.fixed_threshold)
            target = TARGET_AGREEMENT if self.fixed_threshold is None else None
            keep = self.pooled_requests
            if due.fresh:
                keep = min(keep, FRESH_POOLED_REQUESTS)
            self.history[name] = pooled(self.history.get(name), now, keep, target, is_noticed=due.fresh)
        scene = self.scene
        each = scene.prompt_evaluation_seconds if due.prompts_only else scene.evaluation_seconds
        seconds = each * len(recent) * len(names)
        self.done.evaluating_seconds += seconds
        self.done.assessments += 1
        self.agenda.evaluation_ended(seconds, threads=1, failed=False)

    def _decide(self, due: Decide, seen: Outlook, request: Request) -> None:
        began = time.perf_counter()
        if due.bar is not None:
            self.bars = (*self.bars, due.bar)
        if due.trigger is Trigger.BREACH:
            self.done.alarms.append(seen.finished)
        profiles = self.history
        self.bars = tuple(bar for bar in self.bars if profiles[bar.model].time <= bar.time)
        situation = Situation(
            trigger=due.trigger,
            slo=Slo(),
            history=dict(self.history),
            candidates=tuple(self.scene.profiles),
            workers=(self._view(),),
            plan=self.chosen,
            reading=self.agenda.reading,
            bars=self.bars,
            requests_since_move=None if self.moved_at is None else seen.finished - self.moved_at,
            prompt_tokens=self.scene.prompt_tokens,
            output_tokens=request.records[next(iter(self.scene.profiles))].tokens,
        )
        decision = decide(situation, self.settings)
        self.done.deciding_seconds += time.perf_counter() - began
        self.agenda.decided(due.trigger, decision, seen)
        plan = decision.plan or self.plan
        if plan != self.plan:
            cost = next(one.cost_seconds for one in decision.options if one.plan == plan)
            self.done.seconds += cost
            self.done.moving_seconds += cost
            self.done.moves.append(
                {
                    "request": seen.finished,
                    "from": str(self.plan),
                    "to": str(plan),
                    "trigger": str(due.trigger),
                }
            )
            self.window.clear()
        if decision.moves:
            # As in the controller, the first choice begins a dwell too.
            self.moved_at = seen.finished
        if plan != self.plan or self.chosen is None:
            self.threshold = self._threshold(plan)
        self.plan = self.chosen = plan

    def _serve(self, request: Request) -> None:
        done, plan = self.done, self.plan
        record = request.records[plan.model]
        index = record.exit_layers.index(plan.depth)
        unsure = record.confidences[index] < self.threshold
        self.window.extend(unsure.tolist())
        nats = record.nats[index]
        read = read_positions(record.tokens + 1, SERVED_PROMPT_READINGS)
        served = Served(
            plan,
            1,
            record.tokens,
            -float(np.log(record.confidences[index]).sum(dtype=np.float64)),
            int(bool(read)),
            len(read),
            float(nats[read].sum(dtype=np.float64)) if read else 0.0,
        )
        done.plans.append(plan)
        done.seconds += record.tokens * self.scene.token_seconds(plan)
        self.agenda.observe(served, self.history, done.seconds)
        done.nats += float(nats.sum(dtype=np.float64))
        done.tokens += record.tokens
        done.text_bytes += record.text_bytes

    def _view(self) -> WorkerView:
        scene = self.scene
        return WorkerView(
            worker_id="simulated",
            model=self.plan.model,
            depth=self.plan.depth,
            tokenizer_id=scene.profiles[self.plan.model].tokenizer_id,
            running=scene.batch,
            tokens_in_flight=scene.batch * scene.prompt_tokens,
            window_tokens=len(self.window),
            window_high_exit_tokens=sum(self.window),
            threshold=self.threshold,
            max_running=scene.batch,
        )

    def _threshold(self, plan: ServedPlan) -> float:
        """The confidence below which tokens are unsure, calibrated on the requests that chose the plan.

        At the last layer no token is unsure.
        """
        by_depth = self.scene.thresholds[plan.model]
        if plan.depth not in by_depth:
            return 0.0
        if self.fixed_threshold is not None:
            return self.fixed_threshold
        return self.history[plan.model].at(plan.depth).threshold
