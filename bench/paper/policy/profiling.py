"""Profiles the candidates as the profiler does, and measures the cost."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from bench.paper.policy.traffic import Request
from bench.systems.subject import Subject
from helios.engine.evaluation.candidate import Candidate
from helios.engine.evaluation.evaluate import evaluate
from helios.engine.evaluation.router_examples import evaluate_for_router
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.evaluation.speed import measure_reading
from helios.history import ModelProfile
from services.profiler.settings import ProfilerSettings


def evaluation_settings(subject: Subject) -> EvaluationSettings:
    """The profiler's settings for evaluations, with more timed steps."""
    sizes = subject.sizes
    return EvaluationSettings(
        batches=sizes.batches,
        generated_tokens=ProfilerSettings.model_fields["generated_tokens"].default,
        repetitions=sizes.timed_steps,
        memory_bytes=subject.memory_bytes,
        precision=subject.precision,
    )


def profile(
    subject: Subject, candidates: Sequence[Candidate], requests: Sequence[Request]
) -> tuple[dict[str, ModelProfile], dict[str, float]]:
    """Profiles of the candidates, and the cost of profiling them again once their speeds are known."""
    settings = evaluation_settings(subject)
    prompts = [list(request.ids) for request in requests[: subject.sizes.profiled_requests]]
    profiles = {one.entry.name: evaluate(one, prompts, settings) for one in candidates}
    again = [evaluate(one, prompts, settings, timed=profiles[one.entry.name]) for one in candidates]
    cpu_seconds = sum(one.cpu_seconds for one in again)
    alone = replace(settings, generated_tokens=1)
    prompts_only = [evaluate(one, prompts, alone, timed=profiles[one.entry.name]) for one in candidates]
    pairs = len(prompts) * len(candidates)
    names = [str(number) for number in range(len(prompts))]
    began = time.process_time()
    for one in candidates:
        evaluate_for_router(one, prompts, names, settings)
    router_seconds = time.process_time() - began
    return profiles, {
        "seconds_per_assessment": sum(one.wall_seconds for one in again),
        "cpu_seconds_per_assessment": cpu_seconds,
        "cpu_seconds_per_request_and_model": cpu_seconds / pairs,
        # The cost when prompts are not continued.
        "cpu_seconds_per_prompt_and_model": sum(one.cpu_seconds for one in prompts_only) / pairs,
        # The cost of an example for a router.
        "cpu_seconds_per_example": router_seconds / pairs,
        "cpu_seconds_once": sum(one.once_cpu_seconds for one in profiles.values()),
    }


def row_seconds(subject: Subject, candidates: Sequence[Candidate], rows: int) -> float:
    """Mean seconds of a row of the LM head at the candidates' first exits, when `rows` are read at once."""
    return statistics.fmean(
        measure_reading(one.model, one.entry.exit_layers[0], rows, subject.sizes.timed_steps)
        for one in candidates
    )
