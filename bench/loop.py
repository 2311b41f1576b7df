"""The HELIOS loop over drifting traffic: the controller's own policy, on recorded requests and on an engine.

Simulated time is tokens times the step times that the profiler measured, plus the cost of every move; so a
sweep costs nothing, and all its settings see the same tokens. The served run reloads a real engine.
"""

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench import decode, held_out, traffic
from bench.report import Target
from bench.subject import Subject
from bench.traffic import Request
from helios.calibration import TARGET_AGREEMENT
from helios.catalog import ModelEntry
from helios.drift import pooled
from helios.engine import Engine
from helios.engine.evaluation import Candidate, EvaluationSettings, evaluate, load_candidate
from helios.engine.exit_trace import trace_dynamic
from helios.history import ExitProfile, ModelProfile
from helios.slo import Slo
from services.controller.allowance import Allowance
from services.controller.policy import Moves, PolicySettings, breach_limit, decide, is_suspicious
from services.controller.settings import ControllerSettings
from services.controller.situation import Bar, Plan, Situation, Trigger, WorkerView
from services.profiler.settings import ProfilerSettings

_PAPER_TH = 0.8
_SWEEPS: dict[str, tuple[int, ...]] = {
    "reassess_requests": (25, 50, 100, 150, 250, 400),
    "breach_limit": (10, 25, 50, 75, 100),
}
_PROFILED_REQUESTS = (5, 10, 20, 50)
_THRESHOLDS = (None, 0.2, 0.5, 0.8, 0.9)
_REGRET_TARGET, _PAPER_TARGET = 0.05, 1.48
# One stretch of text is one draw of the noise that decisions suffer from.
_STARTS = 6
# As the services have them where nobody sets them.
_BREACH_WAIT: int = ControllerSettings.model_fields["breach_reassess_requests"].default
_PROFILING_SHARE: float = ControllerSettings.model_fields["profiling_share"].default
_POOLED_REQUESTS: int = ProfilerSettings.model_fields["pooled_requests"].default


@dataclass(frozen=True, slots=True)
class _Scene:
    """What is equal for all simulations. Profiles are measured on the first requests."""

    requests: Sequence[Request]
    profiles: Mapping[str, ModelProfile]
    # Thresholds that the engine counts unsure tokens by, per model and depth.
    thresholds: Mapping[str, Mapping[int, float]]
    # Seconds of a step at batch 1 that leaves at each exit, by model: the exits before it read, too, and the
    # KV of the layers behind it filled.
    dynamic_step_seconds: Mapping[str, Sequence[float]]
    batch: int
    profiled_requests: int
    prompt_tokens: int

    def token_seconds(self, plan: Plan) -> float:
        """Seconds per generated token of a saturated engine, the prompt's share included."""
        one = self.profiles[plan.model].at(plan.depth)
        output = self.requests[0].records[plan.model].tokens
        return _token_seconds(one, self.batch, self.prompt_tokens / output)


@dataclass(slots=True)
class _Run:
    """What a simulation gathered."""

    plans: list[Plan] = field(default_factory=list)
    seconds: float = 0.0
    moving_seconds: float = 0.0
    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    deciding_seconds: float = 0.0
    assessments: int = 0
    # Request and token, from the first one on, of each confidence breach.
    breaches: list[tuple[int, int]] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nats_per_byte(self) -> float:
        return self.nats / self.text_bytes


def measure(subject: Subject) -> dict[str, Any]:
    """Regret, reactions, ablation and sweeps on recorded requests; one run on an engine that reloads."""
    candidates = [model for model in subject.models if model.tokenizer_id == subject.models[0].tokenizer_id]
    sizes = subject.sizes
    drifting = traffic.drifting(subject, candidates, sizes.phase_requests, _STARTS)
    subject.say("profiling the candidates")
    loaded = [load_candidate(model, _evaluation(subject)) for model in candidates]
    profiles, profiling = _profile(subject, loaded, drifting[0])
    thresholds = {model.name: dict(subject.plan(model).thresholds) for model in candidates}
    dynamic_steps = {model.name: _dynamic_steps(subject, model) for model in candidates}
    scenes = [
        _Scene(
            requests,
            profiles,
            thresholds,
            dynamic_steps,
            sizes.largest_batch,
            sizes.profiled_requests,
            sizes.prompt_tokens,
        )
        for requests in drifting
    ]
    scene, requests = scenes[0], drifting[0]
    subject.say("the policy on recorded requests")
    settings = PolicySettings.model_validate({})
    run = _simulate(scene, settings)
    default = _figures(scene, run)
    others = [_figures(other, _simulate(other, settings)) for other in scenes[1:]]
    assessment_seconds = profiling["cpu_seconds_per_assessment"]
    spaced = [
        _figures(one, _simulate(one, settings, assessment_seconds=assessment_seconds)) for one in scenes
    ]
    return {
        "requests": len(requests),
        "request_tokens": sizes.request_tokens,
        "phases": list(dict.fromkeys(request.phase for request in requests)),
        "candidates": [model.name for model in candidates],
        "batch": scene.batch,
        "assumed": "simulated time: measured step times at this batch, plus what the policy expects a move "
        "to cost; requests are given text, a prompt of prompt_tokens is charged to each; profiling is free "
        "where nothing else is said",
        "policy": settings.model_dump(mode="json"),
        "default": default,
        # The same traffic begun elsewhere in the texts; and all of them with profiling spaced to keep within
        # its share of CPU, as services do.
        "starts": [_summary(found) for found in (default, *others)],
        "starts_spaced": [_summary(found) for found in spaced],
        "timeline": [
            {"first_request": first, "model": plan.model, "depth": plan.depth}
            for first, plan in _stretches(run.plans)
        ],
        "fixed_plans": _fixed_plans(scene),
        "drifts": default["drifts"],
        "profiling": {
            **profiling,
            "assessments": run.assessments,
            "deciding_seconds": run.deciding_seconds,
            # Were it not spaced: what it would take of one thread that serves all the time.
            "share_if_unspaced": (assessment_seconds * run.assessments)
            / (run.seconds + assessment_seconds * run.assessments),
        },
        "ablation": {
            **{
                moves.value: _figures(scene, _simulate(scene, settings.model_copy(update={"moves": moves})))
                for moves in Moves
            },
            "both, a breach brings no reassessment forward": _figures(
                scene, _simulate(scene, settings, reassesses_after_breach=False)
            ),
            "both, only the last evaluation counts": _figures(
                scene, _simulate(scene, settings, pooled_requests=1)
            ),
            f"both, profiling within {_PROFILING_SHARE:.1%} of the CPU": spaced[0],
        },
        "sweeps": {
            **{
                name: [
                    {"value": value}
                    | _figures(scene, _simulate(scene, settings.model_copy(update={name: value})))
                    for value in values
                ]
                for name, values in _SWEEPS.items()
            },
            "profiled_requests": [
                {"value": value} | _figures(scene, _simulate(scene, settings, profiled_requests=value))
                for value in _PROFILED_REQUESTS
            ],
            "threshold": [
                {"value": "calibrated" if value is None else value}
                | _figures(scene, _simulate(scene, settings, value))
                | {"dynamic_tokens_per_second": _dynamic_rate(scene, candidates[0].name, value)}
                for value in _THRESHOLDS
            ],
        },
        "paper_setting": _paper_setting(scene, candidates),
        "served": _serve(subject, loaded, profiles),
    }


def targets(result: dict[str, Any]) -> list[Target]:
    """Regret, reaction, the cost of control, and the paper's own setting.

    Met or not is decided where profiling is spaced as services space it: a cost kept on one side is not to
    be left out on the other.
    """
    starts = result["starts_spaced"]
    fixed = [one["regret"] for one in starts if one["regret"] is not None]
    by_phase, unspaced = (
        statistics.fmean(one["regret_by_phase"] for one in result[name])
        for name in ("starts_spaced", "starts")
    )
    said = f"{statistics.fmean(fixed):+.1%}" if fixed else "no fixed plan is as good"
    interval, window = result["policy"]["reassess_requests"], result["policy"]["window_tokens"]
    drifts = [drift for one in starts for drift in one["drifts"] if drift["needs_move"]]
    reactions = [drift["requests_until_move"] for drift in drifts]
    within = [drift["requests_until_within_bound"] for drift in drifts]
    breaches = [tokens for drift in drifts if (tokens := drift["tokens_until_breach"]) is not None]
    moved = ", ".join("none" if one is None else str(one) for one in reactions)
    median = statistics.median_low([math.inf if one is None else one for one in within] or [0])
    factor = result["paper_setting"]["ratio"]
    dynamic = result["paper_setting"]["dynamic_model"]
    return [
        Target(
            f"regret on drifting traffic (simulated, mean of {len(starts)}, profiling within "
            f"{_PROFILING_SHARE:.1%} of the CPU)",
            f"at most {_REGRET_TARGET:.0%}",
            f"against one fixed plan of no worse quality: {said}; against the best plan of each phase within "
            f"the bound: {by_phase:+.1%}, {unspaced:+.1%} were profiling free",
            not fixed or statistics.fmean(fixed) <= _REGRET_TARGET,
        ),
        Target(
            "reaction to a drift that breaks the quality bound (simulated)",
            f"breach within {window} tokens, else within RI, {interval} requests",
            f"{len(drifts)} drifts; breaches after {', '.join(map(str, breaches)) or 'none'} tokens; first "
            f"moves after {moved} requests; "
            f"within the bound after {median} (median)"
            if drifts
            else "no drift needed a move",
            all(tokens <= window for tokens in breaches)
            and all(reaction is not None and reaction <= interval for reaction in reactions),
        ),
        Target(
            "throughput in the paper's own setting (TH 0.8), concurrency 1, against dynamic (simulated)",
            f"at least {_PAPER_TARGET:g}x",
            f"{factor:.2f}x of {dynamic}",
            factor >= _PAPER_TARGET,
        ),
    ]


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    names = ("regret", "regret_by_phase", "perplexity_increase", "moves", "drifts")
    return {name: found[name] for name in names}


def _evaluation(subject: Subject) -> EvaluationSettings:
    sizes = subject.sizes
    return EvaluationSettings(
        batches=sizes.batches,
        generated_tokens=ProfilerSettings.model_fields["generated_tokens"].default,
        repetitions=sizes.timed_steps,
        memory_bytes=subject.memory_bytes,
        precision=subject.precision,
    )


def _profile(
    subject: Subject, candidates: Sequence[Candidate], requests: Sequence[Request]
) -> tuple[dict[str, ModelProfile], dict[str, float]]:
    """Profiles with timed steps; and the cost of profiling all again, loaded and with known speeds."""
    settings = _evaluation(subject)
    prompts = [list(request.ids) for request in requests[: subject.sizes.profiled_requests]]
    profiles = {one.entry.name: evaluate(one, prompts, settings) for one in candidates}
    again = [evaluate(one, prompts, settings, timed=profiles[one.entry.name]) for one in candidates]
    return profiles, {
        "seconds_per_assessment": sum(one.wall_seconds for one in again),
        "cpu_seconds_per_assessment": sum(one.cpu_seconds for one in again),
        "cpu_seconds_once": sum(one.once_cpu_seconds for one in profiles.values()),
    }


def _dynamic_steps(subject: Subject, model: ModelEntry) -> list[float]:
    """Seconds of a step of one token that leaves at each exit, the last among them; medians."""
    plan, prompt = subject.plan(model), subject.sizes.prompt_tokens
    (text, *_) = subject.windows(model, next(iter(held_out.DOMAINS)))

    def walked(tokens: int, thresholds: Mapping[int, float]) -> float:
        began = time.thread_time()
        trace_dynamic(plan, [text[: prompt + tokens]], prompt, thresholds)
        return time.thread_time() - began

    found = []
    for depth in model.exit_layers:
        # Sure at this exit, and never before it.
        thresholds = {layer: 0.0 if layer == depth else math.inf for layer in model.exit_layers[:-1]}
        # The first token comes with the prompt's prefill, which is taken off.
        taken = [
            (walked(1 + prompt, thresholds) - walked(1, thresholds)) / prompt
            for _ in range(subject.sizes.timed_steps)
        ]
        found.append(statistics.median(taken))
    return found


def _simulate(
    scene: _Scene,
    settings: PolicySettings,
    threshold: float | None = None,
    profiled_requests: int | None = None,
    *,
    pooled_requests: int = _POOLED_REQUESTS,
    reassesses_after_breach: bool = True,
    assessment_seconds: float | None = None,
) -> _Run:
    """The controller's loop over the recorded requests.

    threshold: of every exit; None: calibrated. profiled_requests: recent ones that profiling runs; None: the
    scene's. reassesses_after_breach: whether a breach, which is answered from the last history, or tokens
    that are far from it, bring the next reassessment forward to when the recent requests are all younger.
    assessment_seconds: CPU that one takes, which spaces them; None: they are free.
    """
    sample = profiled_requests or scene.profiled_requests
    run = _Run()
    allowance = Allowance(1 if assessment_seconds is None else _PROFILING_SHARE, lambda: run.seconds)
    target = TARGET_AGREEMENT if threshold is None else None
    window: deque[bool] = deque(maxlen=settings.window_tokens)
    history: dict[str, ModelProfile] = {}
    plan: Plan | None = None
    answered: set[Plan] = set()
    bars: tuple[Bar, ...] = ()
    moved_at: int | None = None
    next_assessment, brought_forward = 0, math.inf
    dwell_over: float = math.inf
    is_breached = False
    for number, request in enumerate(scene.requests):
        trigger = None
        if is_breached and plan is not None:
            trigger, is_breached = Trigger.BREACH, False
            answered.add(plan)
            bars = (
                *bars,
                Bar(
                    model=plan.model,
                    depth=plan.depth,
                    time=float(number),
                    reason="confidence breach",
                    shallower=True,
                ),
            )
            if reassesses_after_breach:
                brought_forward = min(brought_forward, number + _BREACH_WAIT)
        elif number >= min(next_assessment, brought_forward) and allowance.permits(
            urgent=number >= brought_forward
        ):
            trigger = Trigger.REASSESSMENT if number else Trigger.START
            next_assessment, brought_forward = number + settings.reassess_requests, math.inf
            answered.clear()
            bars = ()
            # Before the first request there is nothing recent; the first ones are profiled then.
            recent = scene.requests[max(0, number - sample) : number] or scene.requests[:sample]
            for name, base in scene.profiles.items():
                now = traffic.profile(base, recent, float(number), threshold)
                history[name] = pooled(history.get(name), now, max(pooled_requests, sample), target)
            allowance.spend(assessment_seconds or 0.0, threads=1)
            run.assessments += 1
        elif number >= dwell_over:
            trigger = Trigger.DWELL
        if trigger is not None:
            began = time.perf_counter()
            situation = Situation(
                trigger=trigger,
                slo=Slo(),
                history=dict(history),
                candidates=tuple(scene.profiles),
                workers=(_view(scene, plan or _deepest(scene), window, history, threshold),),
                plan=plan,
                bars=bars,
                requests_since_move=None if moved_at is None else number - moved_at,
                prompt_tokens=scene.prompt_tokens,
                output_tokens=request.records[next(iter(scene.profiles))].tokens,
            )
            decision = decide(situation, settings)
            run.deciding_seconds += time.perf_counter() - began
            again = decision.again_after_requests
            dwell_over = math.inf if again is None else number + again
            chosen = decision.plan or _deepest(scene)
            if plan is not None and chosen != plan:
                cost = next(one.cost_seconds for one in decision.options if one.plan == chosen)
                run.seconds += cost
                run.moving_seconds += cost
                run.moves.append(
                    {"request": number, "from": str(plan), "to": str(chosen), "trigger": str(trigger)}
                )
                moved_at = number
                window.clear()
            plan = chosen
        assert plan is not None
        record = request.records[plan.model]
        index = record.exit_layers.index(plan.depth)
        unsure = record.confidences[index] < _threshold(scene, plan, history, threshold)
        limit = breach_limit(_view(scene, plan, window, history, threshold), history[plan.model], settings)
        for token, is_unsure in enumerate(unsure.tolist()):
            window.append(is_unsure)
            full = len(window) == settings.window_tokens
            if full and plan not in answered and not is_breached and sum(window) >= limit:
                is_breached = True
                run.breaches.append((number, run.tokens + token + 1))
        view = _view(scene, plan, window, history, threshold)
        if reassesses_after_breach and is_suspicious(view, history[plan.model], settings):
            brought_forward = min(brought_forward, number + _BREACH_WAIT)
        run.plans.append(plan)
        run.seconds += record.tokens * scene.token_seconds(plan)
        run.nats += float(record.nats[index].sum(dtype=np.float64))
        run.tokens += record.tokens
        run.text_bytes += record.text_bytes
    return run


def _view(
    scene: _Scene,
    plan: Plan,
    window: deque[bool],
    history: Mapping[str, ModelProfile],
    threshold: float | None,
) -> WorkerView:
    profile = scene.profiles[plan.model]
    return WorkerView(
        worker_id="simulated",
        model=plan.model,
        depth=plan.depth,
        tokenizer_id=profile.tokenizer_id,
        running=scene.batch,
        tokens_in_flight=scene.batch * scene.prompt_tokens,
        window_tokens=len(window),
        window_high_exit_tokens=sum(window),
        threshold=_threshold(scene, plan, history, threshold),
        max_running=scene.batch,
    )


def _threshold(
    scene: _Scene, plan: Plan, history: Mapping[str, ModelProfile], threshold: float | None
) -> float:
    """What the engine calls unsure at the plan's depth: as calibrated on recent requests, with which the
    controller reloads; without any, as the checkpoint says. At the last layer nothing."""
    by_depth = scene.thresholds[plan.model]
    if plan.depth not in by_depth:
        return 0.0
    if threshold is not None:
        return threshold
    return history[plan.model].at(plan.depth).threshold if plan.model in history else by_depth[plan.depth]


def _deepest(scene: _Scene) -> Plan:
    """What serves while nothing is known: the first candidate whole."""
    first = next(iter(scene.profiles.values()))
    return Plan(model=first.model, depth=first.full.depth)


def _fixed_plans(scene: _Scene) -> list[dict[str, Any]]:
    """Every plan, held from the first request to the last."""
    rows = []
    for profile in scene.profiles.values():
        for one in profile.exits:
            plan = Plan(model=profile.model, depth=one.depth)
            fixed = _hold(scene, plan, scene.requests)
            rows.append(
                {
                    "model": plan.model,
                    "depth": plan.depth,
                    "seconds": fixed.seconds,
                    "tokens_per_second": fixed.tokens / fixed.seconds,
                    "nats_per_byte": fixed.nats_per_byte,
                }
            )
    return rows


def _hold(scene: _Scene, plan: Plan, requests: Sequence[Request]) -> _Run:
    run = _Run()
    for request in requests:
        record = request.records[plan.model]
        run.seconds += record.tokens * scene.token_seconds(plan)
        run.nats += float(record.nats[record.exit_layers.index(plan.depth)].sum(dtype=np.float64))
        run.tokens += record.tokens
        run.text_bytes += record.text_bytes
    return run


def _figures(scene: _Scene, run: _Run) -> dict[str, Any]:
    """A simulation in figures. Quality is against the best model at full depth, phase by phase."""
    fixed = _fixed_plans(scene)
    as_good = [row for row in fixed if row["nats_per_byte"] <= run.nats_per_byte]
    best = min(as_good, key=lambda row: float(row["seconds"]), default=None)
    drifts = _drifts(scene, run)
    return {
        "tokens_per_second": run.tokens / run.seconds,
        "nats_per_byte": run.nats_per_byte,
        "perplexity_increase": math.expm1((run.nats - _best_nats(scene)) / run.tokens),
        "moves": len(run.moves),
        "moving_seconds": run.moving_seconds,
        "breaches": len(run.breaches),
        "moved": run.moves,
        "drifts": drifts,
        # At each drift that needs a move; None: never.
        "reactions": [drift["requests_until_within_bound"] for drift in drifts if drift["needs_move"]],
        "best_fixed": best,
        "regret": None if best is None else run.seconds / best["seconds"] - 1,
        "regret_by_phase": run.seconds / _best_by_phase(scene) - 1,
    }


def _best_by_phase(scene: _Scene) -> float:
    """Seconds when each phase is served by the fastest plan that is within the bound on it, in hindsight, and
    moving between them is free."""
    bound = Slo().max_perplexity_increase
    assert bound is not None
    seconds, fulls = 0.0, _full_nats(scene)
    for phase, group in itertools.groupby(scene.requests, key=lambda request: request.phase):
        requests = list(group)
        best = min(fulls[phase].values())
        held = [
            _hold(scene, Plan(model=profile.model, depth=one.depth), requests)
            for profile in scene.profiles.values()
            for one in profile.exits
        ]
        seconds += min(one.seconds for one in held if math.expm1((one.nats - best) / one.tokens) <= bound)
    return seconds


def _best_nats(scene: _Scene) -> float:
    """Nats of the traffic when each phase is served by the model that is best for it, whole."""
    return sum(min(fulls.values()) for fulls in _full_nats(scene).values())


def _full_nats(scene: _Scene) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for phase, group in itertools.groupby(scene.requests, key=lambda request: request.phase):
        requests = list(group)
        found[phase] = {
            profile.model: _hold(scene, Plan(model=profile.model, depth=profile.full.depth), requests).nats
            for profile in scene.profiles.values()
        }
    return found


def _drifts(scene: _Scene, run: _Run) -> list[dict[str, Any]]:
    """At each change of phase: whether the plan broke the bound there, and when one within it served."""
    starts = [
        number
        for number, (before, after) in enumerate(itertools.pairwise(scene.requests), 1)
        if before.phase != after.phase
    ]
    bound = Slo().max_perplexity_increase
    assert bound is not None
    rows = []
    for start, end in itertools.pairwise([*starts, len(scene.requests)]):
        phase = scene.requests[start].phase
        before = run.plans[start - 1]
        held = _hold(scene, before, scene.requests[start:end])
        best = min(_full_nats(scene)[phase].values())
        increase = math.expm1((held.nats - best) / held.tokens)
        within = {
            plan
            for plan in set(run.plans[start:end])
            if math.expm1((_hold(scene, plan, scene.requests[start:end]).nats - best) / held.tokens) <= bound
        }
        tokens_before = sum(request.records[before.model].tokens for request in scene.requests[:start])
        reacted = next((number for number in range(start, end) if run.plans[number] in within), None)
        move = next((one for one in run.moves if one["request"] == reacted), None)
        rows.append(
            {
                "request": start,
                "phase": phase,
                "plan_before": str(before),
                "perplexity_increase_if_kept": increase,
                "needs_move": increase > bound,
                "requests_until_move": next(
                    (one["request"] - start for one in run.moves if start <= one["request"] < end), None
                ),
                "requests_until_within_bound": None if reacted is None else reacted - start,
                "tokens_until_breach": next(
                    (token - tokens_before for number, token in run.breaches if start <= number < end), None
                ),
                "trigger": None if move is None else move["trigger"],
            }
        )
    return rows


def _stretches(plans: Sequence[Plan]) -> list[tuple[int, Plan]]:
    """Where each plan began."""
    return [(0, plans[0])] + [
        (number, after)
        for number, (before, after) in enumerate(itertools.pairwise(plans), 1)
        if before != after
    ]


def _token_seconds(one: ExitProfile, batch: int, prompts_per_token: float) -> float:
    return one.step_seconds(batch) / batch + prompts_per_token / one.prefill_tokens_per_second


def _dynamic_rate(scene: _Scene, model: str, threshold: float | None) -> float:
    """Tokens per second of `dynamic` at batch 1: each token pays a step that leaves at its own exit."""
    profile = scene.profiles[model]
    share = scene.prompt_tokens / scene.requests[0].records[model].tokens
    # Prefill walks all layers.
    prefill = share / profile.full.prefill_tokens_per_second
    steps = np.array(scene.dynamic_step_seconds[model])
    seconds, tokens = 0.0, 0
    for request in scene.requests:
        record = request.records[model]
        limits = [
            _threshold(scene, Plan(model=model, depth=depth), {}, threshold) for depth in record.exit_layers
        ]
        # The last layer's limit is 0: every token has left there.
        first = (record.confidences >= np.array(limits)[:, None]).argmax(axis=0)
        seconds += float(steps[first].sum()) + record.tokens * prefill
        tokens += record.tokens
    return tokens / seconds


def _paper_setting(scene: _Scene, candidates: Sequence[ModelEntry]) -> dict[str, Any]:
    """TH 0.8, CBC 50 of 100, RI 150, one request at a time: against the faster of the models alone."""
    paper = {"window_tokens": 100, "breach_limit": 50, "reassess_requests": 150}
    # The paper knows no suspicion short of a breach.
    settings = PolicySettings.model_validate(paper | {"suspicion_sigmas": 1e6})
    alone = replace(scene, batch=1)
    run = _simulate(alone, settings, _PAPER_TH)
    rates = {model.name: _dynamic_rate(alone, model.name, _PAPER_TH) for model in candidates}
    fastest = max(rates, key=lambda name: rates[name])
    return {
        "helios": _figures(alone, run),
        "dynamic_tokens_per_second": rates,
        "dynamic_model": fastest,
        "ratio": run.tokens / run.seconds / rates[fastest],
    }


def _serve(
    subject: Subject, loaded: Sequence[Candidate], profiles: Mapping[str, ModelProfile]
) -> dict[str, Any]:
    """The loop for real, on one engine: evaluate, decide, reload, while requests are in flight."""
    subject.say("the policy on an engine that reloads")
    sizes = subject.sizes
    candidates = [one.entry for one in loaded]
    per_phase = sizes.served_requests // 3
    domains = tuple(held_out.DOMAINS)
    prompts = [
        prompt
        for kinds in (*((domain,) for domain in domains), domains)
        for prompt in subject.prompts(candidates[0], kinds, per_phase)
    ]
    settings = PolicySettings.model_validate(
        {"reassess_requests": sizes.served_interval, "min_dwell_requests": 0}
    )
    evaluation = _evaluation(subject)
    history: dict[str, ModelProfile] = {}
    engine = subject.engine(candidates[0])
    plan = Plan(model=candidates[0].name, depth=candidates[0].num_layers)
    events: list[dict[str, Any]] = []
    assessed = 0

    def reassess() -> None:
        nonlocal plan, assessed
        finished = engine.telemetry().counters.finished_sequences
        if finished < assessed + sizes.served_interval:
            return
        assessed = finished
        began = time.perf_counter()
        recent = prompts[max(0, finished - sizes.profiled_requests) : finished]
        for one in loaded:
            name = one.entry.name
            now = evaluate(one, recent, evaluation, timed=profiles[name])
            history[name] = pooled(history.get(name), now, _POOLED_REQUESTS, TARGET_AGREEMENT)
        decision = decide(
            _situation(engine, plan, history, sizes.prompt_tokens, sizes.output_tokens), settings
        )
        event: dict[str, Any] = {
            "finished_requests": finished,
            "deciding_seconds": time.perf_counter() - began,
            "plan": str(decision.plan),
            "reason": decision.reason,
        }
        if decision.plan is not None and decision.plan != plan:
            reloaded = engine.reload(subject.model(decision.plan.model).path, decision.plan.depth)
            event["reload"] = {
                "sequences_moved": reloaded.sequences_moved,
                "bytes_read": reloaded.bytes_read,
                "stall_seconds": reloaded.stall_seconds,
            }
            plan = decision.plan
        events.append(event)

    # Of different lengths, so that reloads find requests in flight.
    lengths = [max(1, sizes.output_tokens * (1 + index % 4) // 4) for index in range(len(prompts))]
    run = decode.run(engine, prompts, lengths, sizes.largest_batch, reassess)
    return {
        "requests": len(prompts),
        "tokens": run.tokens,
        "tokens_expected": sum(lengths),
        "tokens_per_second": run.tokens_per_second,
        "reassess_requests": sizes.served_interval,
        "events": events,
    }


def _situation(
    engine: Engine, plan: Plan, history: Mapping[str, ModelProfile], prompt_tokens: int, output_tokens: int
) -> Situation:
    telemetry = engine.telemetry()
    worker = WorkerView(
        worker_id="engine",
        model=plan.model,
        depth=plan.depth,
        tokenizer_id=engine.plan.tokenizer_id,
        running=telemetry.running,
        waiting=telemetry.waiting,
        tokens_in_flight=telemetry.running * (prompt_tokens + output_tokens // 2),
        max_running=engine.settings.max_running,
    )
    return Situation(
        trigger=Trigger.REASSESSMENT,
        slo=Slo(),
        history=history,
        candidates=tuple(history),
        workers=(worker,),
        plan=plan,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
