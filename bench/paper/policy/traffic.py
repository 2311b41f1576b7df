"""Recorded requests with the predictions of every exit of every candidate, and traces of drifting traffic.

The text of a request is given and not generated, so all policies are measured on the same tokens.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bench.systems.subject import Subject
from bench.texts import held_out
from helios.calibration import calibrated_threshold
from helios.catalog import ModelEntry
from helios.engine.evaluation.trace import ExitTrace
from helios.history import CONFIDENCE_BINS, ExitProfile, ModelProfile, RequestSample

_EDGES = [index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS)]
_PROSE, _TECHNICAL = held_out.DOMAINS

# Share of technical text in a phase: constant, or a function of a request's number and the phase's length.
Share: TypeAlias = float | Callable[[int, int], float]
# The phases in order: name and share.
Shape: TypeAlias = tuple[tuple[str, Share], ...]


def _by_turns(number: int, _requests: int) -> float:
    return float(number % 2)


def _sliding(number: int, requests: int) -> float:
    return number / requests


def _in_bursts(number: int, requests: int) -> float:
    """Three bursts: each third of the phase ends with one, over its last two fifths."""
    return float(3 * number / requests % 1 >= 0.6)


STANDARD = "sudden"
# The standard trace with long phases.
LONG = "long"
SHAPES: Mapping[str, Shape] = {
    STANDARD: (("prose", 0), ("technical", 1), ("mix", _by_turns)),
    "other order": (("technical", 1), ("prose", 0), ("mix", _by_turns)),
    "slow slide": (("prose", 0), ("slide", _sliding), ("technical", 1)),
    "bursts": (("prose", 0), ("bursts", _in_bursts), ("technical", 1)),
    "mixtures": (("a fifth technical", 0.2), ("four fifths technical", 0.8), ("prose", 0)),
}
# Traffic without a drift: each trace is one phase of the standard trace.
STEADY: Mapping[str, Shape] = {name: ((name, share),) for name, share in SHAPES[STANDARD]}


@dataclass(frozen=True, slots=True)
class Record:
    """The predictions of one model's exits for one request of n tokens. Each array is [exits, n]."""

    exit_layers: tuple[int, ...]
    confidences: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    nats: NDArray[np.float32]
    text_bytes: int

    @property
    def tokens(self) -> int:
        """The number of tokens of the request."""
        return int(self.nats.shape[1])


@dataclass(frozen=True, slots=True)
class Request:
    """A request, with the predictions of every candidate for it.

    before: the token before `ids`, from which the first of them is predicted.
    """

    phase: str
    domain: str
    before: int
    ids: tuple[int, ...]
    records: Mapping[str, Record]


def record(subject: Subject, candidates: Sequence[ModelEntry]) -> dict[str, list[Request]]:
    """All requests that can be cut from the held-out texts, by domain."""
    return {
        domain: cut(
            subject,
            domain,
            subject.windows(candidates[0], domain),
            {model.name: subject.traces(model, domain) for model in candidates},
        )
        for domain in held_out.DOMAINS
    }


def trace(
    pools: Mapping[str, Sequence[Request]], shape: Shape, phase_requests: int, seed: int
) -> list[Request]:
    """Makes a trace of this shape. Each phase has `phase_requests` requests.

    pools: recorded requests by domain. The seed decides the order of a domain's requests. Where a phase
    mixes domains, it also decides the domain of each request. Requests repeat when a domain has no more.
    """
    draw = random.Random(seed)
    orders = {domain: draw.sample(pool, len(pool)) for domain, pool in pools.items()}
    taken = dict.fromkeys(pools, 0)
    found = []
    for phase, share in shape:
        for number in range(phase_requests):
            technical = share(number, phase_requests) if callable(share) else share
            domain = _TECHNICAL if draw.random() < technical else _PROSE
            order = orders[domain]
            found.append(replace(order[taken[domain] % len(order)], phase=phase))
            taken[domain] += 1
    return found


def profile(
    base: ModelProfile, requests: Sequence[Request], time: float, threshold: float | None
) -> ModelProfile:
    """The profile that the profiler would write for these requests. Speeds and sizes come from `base`.

    threshold: the same for every exit; None: calibrated on the requests.
    """
    records = [request.records[base.model] for request in requests]
    tokens = sum(record.tokens for record in records)
    text_bytes = sum(record.text_bytes for record in records)

    samples = tuple(
        RequestSample(
            # As in the profiler, the text identifies a request, because a repeated request tells nothing new.
            id=str(hash(request.ids)),
            text_bytes=record.text_bytes,
            nats=tuple(record.nats.sum(axis=1, dtype=np.float64).tolist()),
        )
        for request, record in zip(requests, records, strict=True)
    )

    def exit_profile(index: int, one: ExitProfile) -> ExitProfile:
        bins = np.concatenate([_bins(record.confidences[index]) for record in records])
        agrees = np.concatenate([record.agrees[index] for record in records])
        counts = np.bincount(bins, minlength=CONFIDENCE_BINS).tolist()
        agreements = np.bincount(bins[agrees], minlength=CONFIDENCE_BINS).tolist()
        nats = math.fsum(float(record.nats[index].sum(dtype=np.float64)) for record in records)
        own = calibrated_threshold(_EDGES, counts, agreements) if threshold is None else threshold
        return one.model_copy(
            update={
                "threshold": own if one.depth < base.full.depth else 0.0,
                "confidence_counts": tuple(counts),
                "agreement_counts": tuple(agreements),
                "perplexity": math.exp(nats / tokens),
                "nats_per_byte": nats / text_bytes,
            }
        )

    return base.model_copy(
        update={
            "time": time,
            "requests": len(requests),
            "tokens": tokens,
            "bytes_per_token": text_bytes / tokens,
            "exits": tuple(exit_profile(index, one) for index, one in enumerate(base.exits)),
            "samples": samples,
        }
    )


def cut(
    subject: Subject,
    domain: str,
    windows: Sequence[Sequence[int]],
    traces: Mapping[str, Sequence[ExitTrace]],
) -> list[Request]:
    """Cuts windows of text into requests. traces: of each window, by model."""
    length = subject.sizes.request_tokens
    tokenizer = subject.tokenizers[next(iter(traces))]
    found = []
    for number, window in enumerate(windows):
        for start in range(0, len(window) - 1, length):
            # Each position predicts the token after it.
            ids = window[start + 1 : start + 1 + length]
            text_bytes = len(tokenizer.decode(ids).encode())
            records = {}
            for model, of_windows in traces.items():
                trace = of_windows[number]
                part = slice(start, start + length)
                records[model] = Record(
                    trace.exit_layers,
                    trace.confidences[:, part],
                    np.stack([trace.agrees(depth)[part] for depth in trace.exit_layers]),
                    trace.nats[:, part],
                    text_bytes,
                )
            found.append(Request(domain, domain, window[start], tuple(ids), records))
    return found


def _bins(confidences: NDArray[np.float32]) -> NDArray[np.int64]:
    bins = (confidences * CONFIDENCE_BINS).astype(np.int64)
    return np.minimum(bins, CONFIDENCE_BINS - 1)
