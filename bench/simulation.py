"""The controller's own agenda and policy on recorded requests, without any service.

Simulated time is tokens times the step times that the profiler measured, plus the cost of every move. So a
sweep costs nothing, and all its settings see the same tokens. Requests come one after the other. An
evaluation is there at once: what it takes is priced, not waited for.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench import traffic
from bench.traffic import Request
from helios.calibration import TARGET_AGREEMENT
from helios.drift import pooled
from helios.engine.prompt_readings import read_positions
from helios.history import ModelProfile
from helios.settings import SERVED_PROMPT_READINGS
from helios.slo import Slo
from services.controller.agenda import Agenda, AgendaSettings, Decide, Evaluate, Outlook
from services.controller.allowance import Allowance
from services.controller.policy import decide
from services.controller.situation import Bar, Plan, Situation, Trigger, WorkerView
from services.controller.traffic_watch import Served
from services.profiler.settings import ProfilerSettings

POOLED_REQUESTS: int = ProfilerSettings.model_fields["pooled_requests"].default
FRESH_POOLED_REQUESTS: int = ProfilerSettings.model_fields["fresh_pooled_requests"].default
# What is due at a request at most: an evaluation, the decision on it, and what follows from that.
_MOST_DUE = 6


@dataclass(frozen=True, slots=True)
class Scene:
    """What is equal for all simulations of a trace."""

    requests: Sequence[Request]
    profiles: Mapping[str, ModelProfile]
    # Thresholds that the engine counts unsure tokens by until a plan is chosen, per model and depth.
    thresholds: Mapping[str, Mapping[int, float]]
    # Seconds of a step at batch 1 that leaves at each exit, by model: the exits before it read, too, and the
    # KV of the layers behind it filled.
    dynamic_step_seconds: Mapping[str, Sequence[float]]
    batch: int
    profiled_requests: int
    prompt_tokens: int
    # CPU of evaluating one request under one model, continued and not.
    evaluation_seconds: float = 0.0
    prompt_evaluation_seconds: float = 0.0

    def token_seconds(self, plan: Plan) -> float:
        """Seconds per generated token of a saturated engine, the prompt's share included."""
        one = self.profiles[plan.model].at(plan.depth)
        output = self.requests[0].records[plan.model].tokens
        share = self.prompt_tokens / output
        return one.step_seconds(self.batch) / self.batch + share / one.prefill_tokens_per_second


@dataclass(slots=True)
class Run:
    """What a simulation gathered."""

    plans: list[Plan] = field(default_factory=list)
    # Serving and moving; evaluations come on top.
    seconds: float = 0.0
    moving_seconds: float = 0.0
    evaluating_seconds: float = 0.0
    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    deciding_seconds: float = 0.0
    assessments: int = 0
    # Requests at which a drift was noticed.
    alarms: list[int] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nats_per_byte(self) -> float:
        """Cross-entropy of the whole traffic."""
        return self.nats / self.text_bytes

    @property
    def priced_seconds(self) -> float:
        """With the evaluations."""
        return self.seconds + self.evaluating_seconds


def simulate(
    scene: Scene,
    settings: AgendaSettings,
    threshold: float | None = None,
    profiled_requests: int | None = None,
    *,
    pooled_requests: int = POOLED_REQUESTS,
) -> Run:
    """The controller's loop over the recorded requests.

    threshold: of every exit; None: calibrated. profiled_requests: recent ones that a regular evaluation runs;
    None: the scene's.
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
        # What serves while nothing is known: the first candidate whole.
        self.plan = Plan(model=first.model, depth=first.full.depth)
        self.chosen: Plan | None = None
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
        # Before the first request there is nothing recent; the first ones are profiled then.
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
            if self.chosen is not None:
                self.moved_at = seen.finished
            self.window.clear()
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

    def _threshold(self, plan: Plan) -> float:
        """What the engine calls unsure under a plan: as calibrated on the requests that it was chosen by.

        At the last layer nothing.
        """
        by_depth = self.scene.thresholds[plan.model]
        if plan.depth not in by_depth:
            return 0.0
        if self.fixed_threshold is not None:
            return self.fixed_threshold
        return self.history[plan.model].at(plan.depth).threshold
