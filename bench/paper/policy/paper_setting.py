"""The paper's own setting (arXiv 2504.10724): its rule for drifts, and `dynamic` exits, simulated."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bench.paper.policy.hindsight import Hindsight, simulated
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.calibration import DEFAULT_THRESHOLD
from helios.catalog import ModelEntry
from helios.engine.evaluation.trace import trace_dynamic
from services.controller.agenda import AgendaSettings

# The paper's rule for drifts: only the breach counter, and no reassessment is delayed.
RULE = {
    "detection": "window",
    "window_tokens": 100,
    "breach_limit": 50,
    "reassess_requests": 150,
    "profiling_share": 1,
}


def paper_setting(traces: Sequence[Hindsight], candidates: Sequence[ModelEntry]) -> dict[str, Any]:
    """HELIOS against the fastest model alone. TH 0.8, CBC 50 of 100, RI 150, one request at a time."""
    alone = [Hindsight(replace(one.scene, batch=1)) for one in traces]
    helios = simulated(alone, AgendaSettings.model_validate(RULE), threshold=DEFAULT_THRESHOLD)
    rates = {model.name: dynamic_rate(alone, model.name, DEFAULT_THRESHOLD) for model in candidates}
    fastest = max(rates, key=lambda name: rates[name])
    return {
        "helios": helios,
        "dynamic_tokens_per_second": rates,
        "dynamic_model": fastest,
        "ratio": helios["tokens_per_second"] / rates[fastest],
    }


def dynamic_rate(traces: Sequence[Hindsight], model: str, threshold: float | None) -> float:
    """Tokens per second of `dynamic` at batch 1: each token costs a step that leaves at its own exit.

    threshold: the same for every exit; None: calibrated thresholds.
    """
    scene = traces[0].scene
    profile, calibrated = scene.profiles[model], scene.thresholds[model]
    share = scene.prompt_tokens / scene.requests[0].records[model].tokens
    # Prefill runs all layers.
    prefill = share / profile.full.prefill_tokens_per_second
    steps = np.array(scene.dynamic_step_seconds[model])
    # The last layer has no threshold: all tokens that are left leave there.
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


def dynamic_steps(subject: Subject, model: ModelEntry) -> list[float]:
    """Median seconds of a step with one token that leaves at each exit, the last layer included."""
    plan, prompt = subject.plan(model), subject.sizes.prompt_tokens
    (text, *_) = subject.windows(model, next(iter(held_out.DOMAINS)))

    def walked(tokens: int, thresholds: Mapping[int, float]) -> float:
        began = time.thread_time()
        trace_dynamic(plan, [text[: prompt + tokens]], prompt, thresholds)
        return time.thread_time() - began

    found = []
    for depth in model.exit_layers:
        # These thresholds make every token leave at this exit.
        thresholds = {layer: 0.0 if layer == depth else math.inf for layer in model.exit_layers[:-1]}
        # The prefill, which gives the first token, is subtracted.
        taken = [
            (walked(1 + prompt, thresholds) - walked(1, thresholds)) / prompt
            for _ in range(subject.sizes.timed_steps)
        ]
        found.append(statistics.median(taken))
    return found
