"""Compares `greedy` with `full` and `dynamic` in one run of the same engine, with the quality of each."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bench.load import decode
from bench.load.decode import Run
from bench.results import Target
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.calibration import DEFAULT_THRESHOLD
from helios.catalog import ModelEntry
from helios.engine import Engine, ExitMode
from helios.engine.evaluation.trace import trace_dynamic, trace_exits

_BOUNDS = (0.05, 0.01)


@dataclass(frozen=True, slots=True)
class _Forced:
    """The teacher-forced quality of one exit mode, on the same positions of held-out text."""

    perplexity: float
    agreement: float
    mean_exit: float


@dataclass(frozen=True, slots=True)
class _Way:
    """One of the engines that are compared, and how many requests it runs at once."""

    name: str
    model: ModelEntry
    depth: int
    quality: _Forced
    max_running: int
    exit_mode: ExitMode = ExitMode.GREEDY
    threshold: float | None = None


def measure(subject: Subject) -> dict[str, Any]:
    """For each domain and engine: throughput with one request and saturated, latency, energy and quality."""
    return {
        "prompt_tokens": subject.sizes.prompt_tokens,
        "output_tokens": subject.sizes.output_tokens,
        "saturating_requests": subject.sizes.saturating_requests,
        "concurrency": subject.sizes.largest_batch,
        "rounds": subject.sizes.rounds,
        "domains": {domain: _domain(subject, domain) for domain in held_out.DOMAINS},
    }


def targets(result: Mapping[str, Any]) -> list[Target]:
    """The targets for throughput. Each must be met on every domain."""
    return [
        _target(
            result, "against full, saturated, perplexity within +5 %", ("within_5", "full", "saturated"), 1.8
        ),
        _target(
            result, "against full, saturated, perplexity within +1 %", ("within_1", "full", "saturated"), 1.3
        ),
        _target(
            result,
            "against dynamic batch 1, concurrency 1, quality not worse",
            ("no_worse", "dynamic_1", "single"),
            2.0,
        ),
        _target(
            result,
            "against dynamic batch 1, saturated, quality not worse",
            ("no_worse", "dynamic_1", "saturated"),
            10.0,
        ),
    ]


def _target(result: Mapping[str, Any], name: str, figure: tuple[str, str, str], at_least: float) -> Target:
    """figure: the way, the way that it is compared with, and the load."""
    way, base, load = figure
    measured = []
    for domain, found in result["domains"].items():
        ways = found["ways"]
        factor = ways[way][load]["ratio_to"][base]
        plan = f"{ways[way]['model']} at depth {ways[way]['depth']}"
        multiplied = ways[base][load]["multiplied_weights"] / ways[way][load]["multiplied_weights"]
        measured.append((factor, f"{factor:.2f}x on {domain} ({plan}; by operations {multiplied:.2f}x)"))
    met = all(factor >= at_least for factor, _ in measured)
    return Target(
        f"throughput {name}", f"at least {at_least:g}x", "; ".join(said for _, said in measured), met
    )


def _domain(subject: Subject, domain: str) -> dict[str, Any]:
    judge = subject.judge(domain)
    last = judge.num_layers
    largest = subject.sizes.largest_batch
    plan = subject.plan(judge)
    calibrated = plan.thresholds
    fixed = dict.fromkeys(calibrated, DEFAULT_THRESHOLD)
    by_calibrated = _forced_dynamic(subject, judge, domain, calibrated)
    by_fixed = _forced_dynamic(subject, judge, domain, fixed)

    def dynamic(name: str, max_running: int, threshold: float | None) -> _Way:
        quality = by_calibrated if threshold is None else by_fixed
        return _Way(name, judge, last, quality, max_running, ExitMode.DYNAMIC, threshold)

    def greedy(name: str, option: tuple[ModelEntry, int]) -> _Way:
        return _Way(name, *option, _forced_greedy(subject, *option, domain), largest)

    ways = [
        _Way("full", judge, last, _forced_greedy(subject, judge, last, domain), largest, ExitMode.FULL),
        dynamic("dynamic_1", 1, None),
        dynamic("dynamic_batched", largest, None),
        dynamic("dynamic_1_th_0.8", 1, DEFAULT_THRESHOLD),
        dynamic("dynamic_batched_th_0.8", largest, DEFAULT_THRESHOLD),
        *(greedy(f"within_{bound * 100:.0f}", subject.fastest_within(domain, bound)) for bound in _BOUNDS),
        greedy("no_worse", _no_worse(subject, judge, domain, by_calibrated.perplexity)),
    ]
    rows = {
        way.name: {
            "model": way.model.name,
            "depth": way.depth,
            "exit_mode": str(way.exit_mode),
            "max_running": way.max_running,
            "threshold": "calibrated" if way.threshold is None else way.threshold,
            "quality": asdict(way.quality),
        }
        for way in ways
    }
    engines = {way.name: _engine(subject, way) for way in ways}
    for load in ("single", "saturated"):
        subject.say(f"baselines on {domain}, {load}")
        measures = {way.name: _loaded(subject, way, engines[way.name], domain, load) for way in ways}
        runs = decode.alternate(measures, subject.sizes.rounds)
        for way in ways:
            rows[way.name][load] = _figures(way, runs)
    return {"model": judge.name, "calibrated_thresholds": calibrated, "ways": rows}


def _engine(subject: Subject, way: _Way) -> Engine:
    settings = replace(subject.settings(way.exit_mode, way.max_running), threshold=way.threshold)
    return subject.engine(way.model, way.depth, settings)


def _loaded(subject: Subject, way: _Way, engine: Engine, domain: str, load: str) -> Callable[[], Run]:
    """Runs an engine under one load. One at a time needs few requests: its rate does not depend on them."""
    sizes = subject.sizes
    few = load == "single" or way.max_running == 1
    prompts = subject.prompts(
        way.model, (domain,), sizes.single_requests if few else sizes.saturating_requests
    )
    concurrency = 1 if load == "single" else sizes.largest_batch
    return partial(decode.run, engine, prompts, sizes.output_tokens, concurrency)


def _figures(way: _Way, all_runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    runs = all_runs[way.name]
    run = decode.median_run(runs)
    layers = run.exit_layers
    return {
        "requests": len(run.token_ids),
        "tokens_per_second": run.tokens_per_second,
        "tokens_per_cpu_second": run.tokens_per_cpu_second,
        "ttft_ms": asdict(run.ttft_ms),
        "tpot_ms": asdict(run.tpot_ms),
        "mean_exit_layer": sum(layers) / len(layers),
        "multiplied_weights": _multiplied_weights(way, layers),
        "joules_per_token": run.joules_per_token,
        "ratio_to": {
            base: decode.ratio(runs, all_runs[base], lambda one: one.tokens_per_second)
            for base in ("full", "dynamic_1", "dynamic_batched", "dynamic_1_th_0.8")
        },
    }


def _multiplied_weights(way: _Way, exit_layers: Sequence[int]) -> float:
    """Mean number of weights that a token is multiplied by: layers, and the LM head for each exit it reads.

    In exit mode dynamic this includes the weights that compute the KV of skipped layers.
    """
    config = way.model.config
    if way.exit_mode is not ExitMode.DYNAMIC:
        return config.step_parameters(way.depth)
    head = config.step_parameters(0)
    layer = config.step_parameters(1) - head
    mean = sum(exit_layers) / len(exit_layers)
    read = sum(bisect_right(way.model.exit_layers, left) for left in exit_layers) / len(exit_layers)
    return mean * layer + read * head + (way.depth - mean) * 2 * config.kv_size * config.hidden_size


def _no_worse(subject: Subject, judge: ModelEntry, domain: str, perplexity: float) -> tuple[ModelEntry, int]:
    """The smallest depth whose perplexity is not above that of dynamic exits, or all layers."""
    depths = [
        depth
        for depth in judge.exit_layers
        if _forced_greedy(subject, judge, depth, domain).perplexity <= perplexity
    ]
    return judge, min(depths, default=judge.num_layers)


def _texts(subject: Subject, model: ModelEntry, domain: str) -> list[list[int]]:
    sizes = subject.sizes
    windows = held_out.spread(subject.windows(model, domain), sizes.forced_windows)
    return [window[: sizes.prompt_tokens + sizes.forced_tokens] for window in windows]


def _forced_dynamic(
    subject: Subject, model: ModelEntry, domain: str, thresholds: Mapping[int, float]
) -> _Forced:
    texts, prefix = _texts(subject, model, domain), subject.sizes.prompt_tokens
    subject.say(f"dynamic exits of {model.name} on held-out {domain} text")
    plan = subject.plan(model)
    dynamic = trace_dynamic(plan, texts, prefix, thresholds)
    full_tops = np.stack([trace.top_ids[-1, prefix - 1 :] for trace in trace_exits(plan, texts)])
    return _Forced(
        math.exp(dynamic.nats.mean(dtype=np.float64)),
        float((dynamic.top_ids == full_tops).mean()),
        float(dynamic.exit_layers.mean()),
    )


def _forced_greedy(subject: Subject, model: ModelEntry, depth: int, domain: str) -> _Forced:
    prefix = subject.sizes.prompt_tokens
    traces = trace_exits(subject.plan(model), _texts(subject, model, domain))
    nats = np.stack([trace.nats[trace.index(depth), prefix - 1 :] for trace in traces])
    agreement = np.stack([trace.agrees(depth)[prefix - 1 :] for trace in traces])
    return _Forced(math.exp(nats.mean(dtype=np.float64)), float(agreement.mean()), float(depth))
