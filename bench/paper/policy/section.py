"""The section `policy`: runs the controller's agenda and policy on recorded traffic and on an engine."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from bench.paper.policy import sweeps, traffic
from bench.paper.policy.comparison import compare, record_unseen
from bench.paper.policy.engine_run import serve
from bench.paper.policy.hindsight import Hindsight, bound, simulated, summary
from bench.paper.policy.paper_setting import dynamic_steps, paper_setting
from bench.paper.policy.profiling import evaluation_settings, profile, row_seconds
from bench.paper.policy.simulation import Scene, simulate
from bench.systems.subject import Subject
from helios.engine.evaluation.candidate import load_candidate
from helios.routing.probe import PROBE_READINGS
from helios.served import ServedPlan
from services.controller.agenda import AgendaSettings


def measure(subject: Subject) -> dict[str, Any]:
    """Simulates traces, routers, an ablation and sweeps on recorded requests; runs an engine that reloads."""
    candidates = [model for model in subject.models if model.tokenizer_id == subject.models[0].tokenizer_id]
    sizes = subject.sizes
    pools = traffic.record(subject, candidates)
    subject.say("profiling the candidates")
    loaded = [load_candidate(model, evaluation_settings(subject)) for model in candidates]
    profiles, profiling = profile(subject, loaded, next(iter(pools.values())))
    empty = Scene(
        requests=(),
        profiles=profiles,
        thresholds={model.name: dict(subject.plan(model).thresholds) for model in candidates},
        dynamic_step_seconds={model.name: dynamic_steps(subject, model) for model in candidates},
        batch=sizes.largest_batch,
        profiled_requests=sizes.profiled_requests,
        prompt_tokens=sizes.prompt_tokens,
        evaluation_seconds=profiling["cpu_seconds_per_request_and_model"],
        prompt_evaluation_seconds=profiling["cpu_seconds_per_prompt_and_model"],
        router_evaluation_seconds=profiling["cpu_seconds_per_example"],
        row_seconds=row_seconds(subject, loaded, PROBE_READINGS),
    )

    def traces(shape: traffic.Shape, phase_requests: int, count: int) -> list[Hindsight]:
        return [
            Hindsight(replace(empty, requests=traffic.trace(pools, shape, phase_requests, seed)))
            for seed in range(count)
        ]

    def row(shape: traffic.Shape, phase_requests: int, count: int) -> dict[str, Any]:
        return simulated(traces(shape, phase_requests, count), settings)

    subject.say("the standard trace, simulated")
    settings = AgendaSettings.model_validate({})
    standard = traces(traffic.SHAPES[traffic.STANDARD], sizes.phase_requests, sizes.traces)
    first, few = standard[0], standard[: sizes.few_traces]
    run = simulate(first.scene, settings)
    figures = [first.figures(run), *(one.figures(simulate(one.scene, settings)) for one in standard[1:])]
    subject.say("other traffic, simulated")
    long_phase = sizes.long_phase_requests
    drifting = {
        traffic.STANDARD: {**summary(figures), "each": [asdict(one) for one in figures]},
        traffic.LONG: row(traffic.SHAPES[traffic.STANDARD], long_phase, sizes.few_traces),
        **{
            name: row(shape, sizes.phase_requests, sizes.traces)
            for name, shape in traffic.SHAPES.items()
            if name != traffic.STANDARD
        },
    }
    steady = {name: row(shape, long_phase, sizes.few_traces) for name, shape in traffic.STEADY.items()}
    strange = record_unseen(subject, candidates)
    subject.say("the router and other methods, simulated")
    comparison = compare(empty, pools, strange, sizes)
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
        # Figures of the first standard trace.
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
            # Share of the time of one thread that serves without a pause.
            "share": run.evaluating_seconds / run.priced_seconds,
        },
        "drifting": drifting,
        "steady": steady,
        "comparison": comparison,
        "ablation": sweeps.ablation(few),
        "sweeps": sweeps.sweeps(few),
        "paper_sweeps": sweeps.paper_sweeps(few, candidates[0].name),
        "paper_setting": paper_setting(few, candidates),
        "served": serve(subject, loaded, profiles),
    }


def _stretches(plans: Sequence[ServedPlan]) -> list[tuple[int, ServedPlan]]:
    """The number of the request at which each plan began."""
    return [(0, plans[0])] + [
        (number, after)
        for number, (before, after) in enumerate(itertools.pairwise(plans), 1)
        if before != after
    ]
