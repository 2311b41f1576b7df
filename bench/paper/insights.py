"""Checks the three insights behind HELIOS (arXiv 2504.10724, motivation) on our models and texts."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.results import Target
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.calibration import DEFAULT_THRESHOLD, TARGET_AGREEMENT, calibrated_threshold
from helios.catalog import ModelEntry
from helios.engine.evaluation.trace import ExitTrace
from helios.history import CONFIDENCE_BINS

# The paper's interval between reassessments (RI), and shorter ones.
_INTERVALS = (25, 50, 150)


def measure(subject: Subject) -> dict[str, Any]:
    """Measures complementary exits, low-confidence tokens and temporal locality."""
    subject.say("the three insights")
    return {
        "request_tokens": subject.sizes.request_tokens,
        "exits": [_exits(subject, model, domain) for model in subject.models for domain in _kinds()],
        "complementary": _complementary(subject),
        "low_confidence": [
            row for model in subject.models for domain in _kinds() for row in _unsure(subject, model, domain)
        ],
        "locality": [_locality(subject, model) for model in subject.models],
    }


def targets(_result: dict[str, Any]) -> list[Target]:
    """None. Other sections have targets for the consequences of the insights."""
    return []


def _kinds() -> tuple[str, ...]:
    return (*held_out.DOMAINS, "all")


def _joined(subject: Subject, model: ModelEntry, domain: str) -> list[ExitTrace]:
    domains = tuple(held_out.DOMAINS) if domain == "all" else (domain,)
    return [trace for one in domains for trace in subject.traces(model, one)]


def _sure(traces: Sequence[ExitTrace], depth: int, threshold: float) -> NDArray[np.bool_]:
    return np.concatenate([trace.confidences[trace.index(depth)] >= threshold for trace in traces])


def _thresholds(subject: Subject, model: ModelEntry) -> dict[str, dict[int, float]]:
    calibrated = dict(subject.plan(model).thresholds)
    return {"calibrated": calibrated, "0.8": dict.fromkeys(calibrated, DEFAULT_THRESHOLD)}


def _exits(subject: Subject, model: ModelEntry, domain: str) -> dict[str, Any]:
    """The shares of tokens that would leave a model at its first exit, and at its last layer."""
    traces = _joined(subject, model, domain)
    found: dict[str, Any] = {"model": model.name, "domain": domain}
    for name, thresholds in _thresholds(subject, model).items():
        sure = {depth: _sure(traces, depth, threshold) for depth, threshold in thresholds.items()}
        gone = np.logical_or.reduce(list(sure.values()))
        found[f"th_{name}"] = {
            "at_earliest_exit": float(sure[min(sure)].mean()),
            "needs_all_layers": float(1 - gone.mean()),
            "sure_at_exit": {str(depth): float(of_exit.mean()) for depth, of_exit in sure.items()},
        }
    return found


def _complementary(subject: Subject) -> list[dict[str, Any]]:
    """Of the tokens on which one model's early exit is unsure, the share on which another model's is sure."""
    rows = []
    for first, second in itertools.permutations(subject.models, 2):
        if first.tokenizer_id != second.tokenizer_id:
            continue  # Their tokenizers differ.
        for domain, name in itertools.product(_kinds(), ("calibrated", "0.8")):
            thresholds = [_thresholds(subject, model)[name] for model in (first, second)]
            traces = [_joined(subject, model, domain) for model in (first, second)]
            for depth, other in itertools.product(*(one for one in thresholds)):
                sure = _sure(traces[0], depth, thresholds[0][depth])
                also = _sure(traces[1], other, thresholds[1][other])
                rest = int((~sure).sum())
                rows.append(
                    {
                        "first": first.name,
                        "first_depth": depth,
                        "second": second.name,
                        "second_depth": other,
                        "domain": domain,
                        "threshold": name,
                        "first_alone": float(sure.mean()),
                        "second_alone": float(also.mean()),
                        "second_of_the_rest": float((also & ~sure).sum() / rest) if rest else None,
                        "together": float((sure | also).mean()),
                    }
                )
    return rows


def _unsure(subject: Subject, model: ModelEntry, domain: str) -> list[dict[str, Any]]:
    """The share of tokens below an exit's threshold, and how many of these equal the last layer's tokens."""
    traces = _joined(subject, model, domain)
    rows = []
    for name, thresholds in _thresholds(subject, model).items():
        for depth, threshold in thresholds.items():
            unsure = ~_sure(traces, depth, threshold)
            agrees = np.concatenate([trace.agrees(depth) for trace in traces])
            rows.append(
                {
                    "model": model.name,
                    "domain": domain,
                    "depth": depth,
                    "threshold": name,
                    "unsure_share": float(unsure.mean()),
                    "unsure_agreement": float(agrees[unsure].mean()) if unsure.any() else None,
                    "agreement": float(agrees.mean()),
                }
            )
    return rows


def _locality(subject: Subject, model: ModelEntry) -> dict[str, Any]:
    """How much the first exit's histogram changes from one stretch of requests to the next, by length."""
    depth = model.exit_layers[0]
    histograms = {
        domain: [
            _histogram(trace, depth, start, subject.sizes.request_tokens)
            for trace in subject.traces(model, domain)
            for start in range(0, trace.nats.shape[1], subject.sizes.request_tokens)
        ]
        for domain in held_out.DOMAINS
    }
    rows = []
    for interval in _INTERVALS:
        stretches = [
            (domain, np.sum(requests[start : start + interval], axis=0))
            for domain, requests in histograms.items()
            for start in range(0, len(requests) - interval + 1, interval)
        ]
        pairs: list[dict[str, Any]] = [
            {
                "from": before,
                "to": after,
                "distance": _distance(first[0], second[0]),
                "threshold_drift": abs(_calibrated(first) - _calibrated(second)),
                "agreement_above_old_threshold": _agreement_above(second, _calibrated(first)),
            }
            for (before, first), (after, second) in itertools.pairwise(stretches)
        ]
        within = [pair["distance"] for pair in pairs if pair["from"] == pair["to"]]
        across = [pair["distance"] for pair in pairs if pair["from"] != pair["to"]]
        rows.append(
            {
                "requests": interval,
                "within_domain": statistics.fmean(within) if within else None,
                "across_drift": statistics.fmean(across) if across else None,
                "pairs": pairs,
            }
        )
    return {
        "model": model.name,
        "depth": depth,
        "measure": "total variation between confidence histograms of consecutive stretches",
        "target_agreement": TARGET_AGREEMENT,
        "intervals": rows,
    }


def _histogram(trace: ExitTrace, depth: int, start: int, length: int) -> NDArray[np.int64]:
    """Numbers of tokens, and of agreeing tokens, by confidence: [2, bins]."""
    part = slice(start, start + length)
    bins = np.minimum(trace.confidences[trace.index(depth), part] * CONFIDENCE_BINS, CONFIDENCE_BINS - 1)
    counts = np.bincount(bins.astype(np.int64), minlength=CONFIDENCE_BINS)
    agreeing = np.bincount(bins[trace.agrees(depth)[part]].astype(np.int64), minlength=CONFIDENCE_BINS)
    return np.stack([counts, agreeing])


def _distance(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    return float(np.abs(first / first.sum() - second / second.sum()).sum() / 2)


def _calibrated(histogram: NDArray[np.int64]) -> float:
    edges = [index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS)]
    return calibrated_threshold(edges, histogram[0].tolist(), histogram[1].tolist())


def _agreement_above(histogram: NDArray[np.int64], threshold: float) -> float | None:
    first = round(threshold * CONFIDENCE_BINS)
    tokens = int(histogram[0, first:].sum())
    return int(histogram[1, first:].sum()) / tokens if tokens else None
