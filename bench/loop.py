"""The HELIOS loop: the controller's own agenda and policy, on recorded traffic and on an engine.

`simulation.py` runs agenda and policy on the traces of `traffic.py`, `hindsight.py` makes figures of that.
The served run reloads a real engine.
"""

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from bench import decode, held_out, traffic
from bench.hindsight import PHASE_FACTOR, Hindsight, bound, summary
from bench.report import Target
from bench.simulation import POOLED_REQUESTS, Scene, simulate
from bench.subject import Subject
from bench.traffic import Request
from helios.calibration import DEFAULT_THRESHOLD, TARGET_AGREEMENT
from helios.catalog import ModelEntry
from helios.drift import pooled
from helios.engine import Engine
from helios.engine.evaluation.candidate import Candidate, load_candidate
from helios.engine.evaluation.evaluate import evaluate
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.evaluation.trace import trace_dynamic
from helios.history import ModelProfile
from helios.slo import Slo
from services.controller.agenda import AgendaSettings
from services.controller.policy import Moves, decide
from services.controller.situation import Plan, Situation, Trigger, WorkerView
from services.profiler.settings import ProfilerSettings

# The paper's rule as it stands: the breach counter alone, and each reassessment takes place.
_PAPER = {
    "detection": "window",
    "window_tokens": 100,
    "breach_limit": 50,
    "reassess_requests": 150,
    "profiling_share": 1,
}
_SWEEPS: dict[str, tuple[float, ...]] = {
    "drift_delay_requests": (5, 10, 20),
    "false_alarms_per_day": (2, 24, 240),
    "follow_up_requests": (3, 6, 12),
    "most_follow_up_requests": (6, 12, 24),
    "leave_sigmas": (0, 0.2, 0.5),
}
_REASSESS_REQUESTS, _PROFILED_REQUESTS = (50, 150, 400), (5, 10, 20)
_PAPER_SWEEPS: dict[str, tuple[int, ...]] = {
    "reassess_requests": (25, 50, 150, 250, 400),
    "breach_limit": (10, 25, 50, 100),
}
_THRESHOLDS = (None, 0.2, 0.5, 0.8, 0.9)
# Time over that of the best plan of each phase.
_TIME_TARGET, _LONG_TARGET = 1.10, 1.15
_NEEDLESS_TARGET, _PAPER_TARGET = 1.0, 1.48
_LONG = "long"


def measure(subject: Subject) -> dict[str, Any]:
    """Figures of many traces, ablation and sweeps on recorded requests; one run on an engine that reloads."""
    candidates = [model for model in subject.models if model.tokenizer_id == subject.models[0].tokenizer_id]
    sizes = subject.sizes
    pools = traffic.record(subject, candidates)
    subject.say("profiling the candidates")
    loaded = [load_candidate(model, _evaluation(subject)) for model in candidates]
    profiles, profiling = _profile(subject, loaded, next(iter(pools.values())))
    empty = Scene(
        requests=(),
        profiles=profiles,
        thresholds={model.name: dict(subject.plan(model).thresholds) for model in candidates},
        dynamic_step_seconds={model.name: _dynamic_steps(subject, model) for model in candidates},
        batch=sizes.largest_batch,
        profiled_requests=sizes.profiled_requests,
        prompt_tokens=sizes.prompt_tokens,
        evaluation_seconds=profiling["cpu_seconds_per_request_and_model"],
        prompt_evaluation_seconds=profiling["cpu_seconds_per_prompt_and_model"],
    )

    def traces(shape: traffic.Shape, phase_requests: int, count: int) -> list[Hindsight]:
        return [
            Hindsight(replace(empty, requests=traffic.trace(pools, shape, phase_requests, seed)))
            for seed in range(count)
        ]

    def row(shape: traffic.Shape, phase_requests: int, count: int) -> dict[str, Any]:
        return _row(traces(shape, phase_requests, count), _settings())

    subject.say("the standard trace, simulated")
    settings = _settings()
    standard = traces(traffic.SHAPES[traffic.STANDARD], sizes.phase_requests, sizes.traces)
    first, few = standard[0], standard[: sizes.few_traces]
    run = simulate(first.scene, settings)
    figures = [first.figures(run), *(one.figures(simulate(one.scene, settings)) for one in standard[1:])]
    subject.say("other traffic, simulated")
    long_phase = sizes.long_phase_requests
    drifting = {
        traffic.STANDARD: {**summary(figures), "each": [asdict(one) for one in figures]},
        _LONG: row(traffic.SHAPES[traffic.STANDARD], long_phase, sizes.few_traces),
        **{
            name: row(shape, sizes.phase_requests, sizes.traces)
            for name, shape in traffic.SHAPES.items()
            if name != traffic.STANDARD
        },
    }
    steady = {name: row(shape, long_phase, sizes.few_traces) for name, shape in traffic.STEADY.items()}
    subject.say("ablation and sweeps, simulated")
    return {
        "requests": len(run.plans),
        "request_tokens": sizes.request_tokens,
        "phases": [name for name, _ in traffic.SHAPES[traffic.STANDARD]],
        "phase_requests": sizes.phase_requests,
        "long_phase_requests": long_phase,
        "candidates": [model.name for model in candidates],
        "batch": empty.batch,
        "assumed": "time is tokens times the step times measured at this batch, plus what the policy expects "
        "of each move; requests come one after the other and are given text, and each is charged a prompt of "
        "prompt_tokens; an evaluation is there at once, its CPU is priced, not waited for",
        "policy": settings.model_dump(mode="json"),
        "bound": bound(),
        # The first of the standard traces.
        "default": asdict(figures[0]),
        "timeline": [
            {"first_request": number, "model": plan.model, "depth": plan.depth}
            for number, plan in _stretches(run.plans)
        ],
        "fixed_plans": first.fixed_plans(),
        "profiling": {
            **profiling,
            "evaluations": run.assessments,
            "deciding_seconds": run.deciding_seconds,
            # Of one thread that serves all the time.
            "share": run.evaluating_seconds / run.priced_seconds,
        },
        "drifting": drifting,
        "steady": steady,
        "ablation": {
            **{moves.value: _row(few, settings.model_copy(update={"moves": moves})) for moves in Moves},
            "both, only the last evaluation counts": _row(few, settings, pooled_requests=1),
            "both, the paper's rule": _row(few, _settings(detection="window")),
            "both, the paper's rule, no reassessment put off": _row(few, _settings(**_PAPER)),
        },
        "sweeps": {
            # Were reassessments put off to keep profiling within its share, the interval would not matter.
            "reassess_requests": [
                {"value": value} | _row(few, _settings(reassess_requests=value, profiling_share=1))
                for value in _REASSESS_REQUESTS
            ],
            **{
                name: [{"value": value} | _row(few, _settings(**{name: value})) for value in values]
                for name, values in _SWEEPS.items()
            },
            "profiled_requests": [
                {"value": value} | _row(few, settings, profiled_requests=value)
                for value in _PROFILED_REQUESTS
            ],
        },
        "paper_sweeps": {
            **{
                name: [{"value": value} | _row(few, _settings(**_PAPER | {name: value})) for value in values]
                for name, values in _PAPER_SWEEPS.items()
            },
            "threshold": [
                {"value": "calibrated" if value is None else value}
                | _row(few, _settings(**_PAPER), threshold=value)
                | {"dynamic_tokens_per_second": _dynamic_rate(few, candidates[0].name, value)}
                for value in _THRESHOLDS
            ],
        },
        "paper_setting": _paper_setting(few, candidates),
        "served": _serve(subject, loaded, profiles),
    }


def targets(result: dict[str, Any]) -> list[Target]:
    """Quality, time and reaction on drifting traffic, calm on other traffic, and the paper's own setting."""
    standard, long = result["drifting"][traffic.STANDARD], result["drifting"][_LONG]
    limit, count = result["bound"], standard["traces"]
    long_phase, interval = result["long_phase_requests"], result["policy"]["reassess_requests"]
    needless = {name: found["needless_moves"] for name, found in result["steady"].items()}
    needless_mean = statistics.fmean(needless.values())
    by_domain = ", ".join(f"{moves:.2f} on {name}" for name, moves in needless.items())
    steady_traces, steady_within = (
        sum(found[name] for found in result["steady"].values()) for name in ("traces", "within_bound")
    )
    reactions = [math.inf if one is None else one for one in standard["reactions"]]
    slowest = max(reactions, default=0)
    paper = result["paper_setting"]
    return [
        Target(
            f"perplexity on the standard trace ({_simulated(count)})",
            f"within {limit:+.0%} over a trace and {PHASE_FACTOR * limit:+.0%} in each phase, in all traces",
            f"in {standard['within_bound']} of {count}; at most "
            f"{standard['largest_perplexity_increase']:+.2%} over a trace and "
            f"{standard['worst_phase_increase']:+.2%} in a phase",
            standard["within_bound"] == count,
        ),
        Target(
            "time on the standard trace, moves included, over the best plan of each phase in hindsight "
            f"({_simulated(count)})",
            f"at most {_TIME_TARGET:.2f} on the mean",
            f"{standard['time_to_best']:.3f}; {standard['priced_time_to_best']:.3f} with evaluations priced",
            standard["time_to_best"] <= _TIME_TARGET,
        ),
        Target(
            f"the same with phases of {long_phase:,} requests, evaluations priced "
            f"({_simulated(long['traces'])})",
            f"at most {_LONG_TARGET:.2f} on the mean",
            f"{long['priced_time_to_best']:.3f}; {long['time_to_best']:.3f} without evaluations",
            long["priced_time_to_best"] <= _LONG_TARGET,
        ),
        Target(
            f"needless moves in {long_phase:,} requests without a drift ({_simulated(steady_traces)})",
            f"at most {_NEEDLESS_TARGET:g} on the mean",
            f"{needless_mean:.2f} ({by_domain}); within the bound in {steady_within} of {steady_traces}",
            needless_mean <= _NEEDLESS_TARGET,
        ),
        Target(
            f"reaction to a drift that breaks the quality bound ({_simulated(count)})",
            f"within the bound within RI, {interval} requests",
            f"{len(reactions)} drifts; within the bound after {_count(statistics.median_low(reactions))} "
            f"requests on the median, {_count(slowest)} at the slowest"
            if reactions
            else "no drift needed a move",
            slowest <= interval,
        ),
        Target(
            f"throughput in the paper's own setting (TH {DEFAULT_THRESHOLD:g}), concurrency 1, against "
            f"dynamic ({_simulated(paper['helios']['traces'])})",
            f"at least {_PAPER_TARGET:g}x",
            f"{paper['ratio']:.2f}x of {paper['dynamic_model']}",
            paper["ratio"] >= _PAPER_TARGET,
        ),
    ]


def _simulated(traces: int) -> str:
    return f"simulated, {traces} trace{'s' if traces > 1 else ''}"


def _count(requests: float) -> str:
    return f"{requests:g}" if math.isfinite(requests) else "infinitely many"


def _settings(**values: Any) -> AgendaSettings:
    return AgendaSettings.model_validate(values)


def _row(
    traces: Sequence[Hindsight],
    settings: AgendaSettings,
    *,
    threshold: float | None = None,
    profiled_requests: int | None = None,
    pooled_requests: int = POOLED_REQUESTS,
) -> dict[str, Any]:
    """The traces simulated under these settings, as `simulate` takes them."""
    return summary(
        [
            one.figures(
                simulate(one.scene, settings, threshold, profiled_requests, pooled_requests=pooled_requests)
            )
            for one in traces
        ]
    )


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
    cpu_seconds = sum(one.cpu_seconds for one in again)
    alone = replace(settings, generated_tokens=1)
    prompts_only = [evaluate(one, prompts, alone, timed=profiles[one.entry.name]) for one in candidates]
    pairs = len(prompts) * len(candidates)
    return profiles, {
        "seconds_per_assessment": sum(one.wall_seconds for one in again),
        "cpu_seconds_per_assessment": cpu_seconds,
        "cpu_seconds_per_request_and_model": cpu_seconds / pairs,
        # Where the prompts are not continued.
        "cpu_seconds_per_prompt_and_model": sum(one.cpu_seconds for one in prompts_only) / pairs,
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


def _stretches(plans: Sequence[Plan]) -> list[tuple[int, Plan]]:
    """Where each plan began."""
    return [(0, plans[0])] + [
        (number, after)
        for number, (before, after) in enumerate(itertools.pairwise(plans), 1)
        if before != after
    ]


def _dynamic_rate(traces: Sequence[Hindsight], model: str, threshold: float | None) -> float:
    """Tokens per second of `dynamic` at batch 1: each token pays a step that leaves at its own exit.

    threshold: of every exit; None: calibrated.
    """
    scene = traces[0].scene
    profile, calibrated = scene.profiles[model], scene.thresholds[model]
    share = scene.prompt_tokens / scene.requests[0].records[model].tokens
    # Prefill walks all layers.
    prefill = share / profile.full.prefill_tokens_per_second
    steps = np.array(scene.dynamic_step_seconds[model])
    # The last layer has none: every token has left there.
    limits = np.array(
        [
            0.0 if depth not in calibrated else calibrated[depth] if threshold is None else threshold
            for depth in (one.depth for one in profile.exits)
        ]
    )
    seconds, tokens = 0.0, 0
    for request in (request for one in traces for request in one.scene.requests):
        record = request.records[model]
        first = (record.confidences >= limits[:, None]).argmax(axis=0)
        seconds += float(steps[first].sum()) + record.tokens * prefill
        tokens += record.tokens
    return tokens / seconds


def _paper_setting(traces: Sequence[Hindsight], candidates: Sequence[ModelEntry]) -> dict[str, Any]:
    """TH 0.8, CBC 50 of 100, RI 150, one request at a time: against the faster of the models alone."""
    alone = [Hindsight(replace(one.scene, batch=1)) for one in traces]
    helios = _row(alone, _settings(**_PAPER), threshold=DEFAULT_THRESHOLD)
    rates = {model.name: _dynamic_rate(alone, model.name, DEFAULT_THRESHOLD) for model in candidates}
    fastest = max(rates, key=lambda name: rates[name])
    return {
        "helios": helios,
        "dynamic_tokens_per_second": rates,
        "dynamic_model": fastest,
        "ratio": helios["tokens_per_second"] / rates[fastest],
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
    settings = AgendaSettings.model_validate(
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
            history[name] = pooled(history.get(name), now, POOLED_REQUESTS, TARGET_AGREEMENT)
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
