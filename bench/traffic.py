"""Drifting traffic, recorded: prose, then technical, then a mix, and what every exit says of each request.

A request's text is given, not generated, so that every policy is measured on the same tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench import held_out
from bench.subject import Subject
from helios.calibration import calibrated_threshold
from helios.catalog import ModelEntry
from helios.history import CONFIDENCE_BINS, ExitProfile, ModelProfile, RequestSample

_EDGES = [index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS)]


@dataclass(frozen=True, slots=True)
class Record:
    """One model's exits on one request of n tokens, [exits, n] each."""

    exit_layers: tuple[int, ...]
    confidences: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    nats: NDArray[np.float32]
    text_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of the request."""
        return int(self.nats.shape[1])


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it would have gone under every candidate."""

    phase: str
    domain: str
    ids: tuple[int, ...]
    records: Mapping[str, Record]


def drifting(
    subject: Subject, candidates: Sequence[ModelEntry], phase_requests: int, starts: int
) -> list[list[Request]]:
    """Three phases of equally many requests, begun at `starts` places of the texts, which repeat when they
    run out."""
    pools = {domain: _requests(subject, candidates, domain) for domain in held_out.DOMAINS}
    domains = list(held_out.DOMAINS)
    phases = [(domain, [domain]) for domain in domains] + [("mix", domains)]

    def begin(start: int) -> list[Request]:
        taken = {domain: len(pool) * start // starts for domain, pool in pools.items()}

        def take(phase: str, domain: str) -> Request:
            request = pools[domain][taken[domain] % len(pools[domain])]
            taken[domain] += 1
            return Request(phase, domain, request.ids, request.records)

        return [
            take(phase, kinds[index % len(kinds)])
            for phase, kinds in phases
            for index in range(phase_requests)
        ]

    return [begin(start) for start in range(starts)]


def profile(
    base: ModelProfile, requests: Sequence[Request], time: float, threshold: float | None
) -> ModelProfile:
    """What the profiler would measure on these requests. Speeds and sizes are those of `base`, which was
    measured; threshold: of every exit, None: calibrated on the requests."""
    records = [request.records[base.model] for request in requests]
    tokens = sum(record.tokens for record in records)
    text_bytes = sum(record.text_bytes for record in records)

    samples = tuple(
        RequestSample(
            # As for the profiler's, the text is the identity: one that comes again says nothing new.
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


def _requests(subject: Subject, candidates: Sequence[ModelEntry], domain: str) -> list[Request]:
    length = subject.sizes.request_tokens
    tokenizer = subject.tokenizers[candidates[0].name]
    found = []
    for number, window in enumerate(subject.windows(candidates[0], domain)):
        for start in range(0, len(window) - 1, length):
            # What is predicted at these positions are the tokens after them.
            ids = window[start + 1 : start + 1 + length]
            text_bytes = len(tokenizer.decode(ids).encode())
            records = {}
            for model in candidates:
                trace = subject.traces(model, domain)[number]
                part = slice(start, start + length)
                records[model.name] = Record(
                    trace.exit_layers,
                    trace.confidences[:, part],
                    np.stack([trace.agrees(depth)[part] for depth in trace.exit_layers]),
                    trace.nats[:, part],
                    text_bytes,
                )
            found.append(Request(domain, domain, tuple(ids), records))
    return found


def _bins(confidences: NDArray[np.float32]) -> NDArray[np.int64]:
    bins = (confidences * CONFIDENCE_BINS).astype(np.int64)
    return np.minimum(bins, CONFIDENCE_BINS - 1)
