"""Tells whether the traffic has drifted between two evaluations. Without a drift they are pooled.

Five requests say little: from one group of five to the next, an exit's perplexity relative to the last layer
varies by a few per cent, which is as much as the bound on it. Histograms stay valid as long as the traffic
stays the same (the third insight of arXiv 2504.10724), so evaluations are pooled until a test finds a change.
"""

import math
import statistics
from collections.abc import Iterator, Sequence

from helios.calibration import calibrated_threshold
from helios.history import CONFIDENCE_BINS, ExitProfile, ModelProfile, RequestSample

# The traffic has drifted when the means of old and new requests differ by this many standard errors. With
# five new requests, about one evaluation in fifty gives a false alarm. A false alarm only loses the pool.
DRIFT_SIGMAS = 3.5
# The limit after the controller has noticed a drift, because then a drift is likelier. The first requests of
# a new phase vary so much that a higher limit would hide the drift.
NOTICED_DRIFT_SIGMAS = 2.0
_EDGES = [index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS)]


def has_drifted(
    before: Sequence[RequestSample], now: Sequence[RequestSample], sigmas: float = DRIFT_SIGMAS
) -> bool:
    """Whether requests differ by more than chance, in the last layer's nats or in any exit's loss against it.

    sigmas: distance between their means, in standard errors, that counts as a drift. Fewer than two requests
    on either side cannot be tested, and count as drifted.
    """
    if len(before) < 2 or len(now) < 2:
        return True
    return any(_sigmas(old, new) > sigmas for old, new in zip(_series(before), _series(now), strict=True))


def pooled(
    before: ModelProfile | None,
    now: ModelProfile,
    keep: int,
    target_agreement: float | None,
    *,
    is_noticed: bool = False,
) -> ModelProfile:
    """The profile `now`, pooled with the newest requests of `before` up to `keep` requests in total.

    Only `now` counts when the traffic has drifted or `before` has other exits. Speeds, sizes and costs come
    from `now`. target_agreement: target for calibrating thresholds; None: they come from `now`. is_noticed:
    whether the controller has already noticed a drift.
    """
    if before is None or [one.depth for one in before.exits] != [one.depth for one in now.exits]:
        return now
    newest = {sample.id for sample in now.samples}
    others = [sample for sample in before.samples if sample.id not in newest]
    room = max(0, keep - len(now.samples))
    kept = others[len(others) - min(room, len(others)) :]
    sigmas = NOTICED_DRIFT_SIGMAS if is_noticed else DRIFT_SIGMAS
    if not kept or has_drifted(kept, now.samples, sigmas):
        return now
    samples = (*kept, *now.samples)
    # Histograms are not kept per request, so dropped requests are assumed to be like the kept ones.
    share = len(kept) / len(before.samples)

    def together(index: int) -> ExitProfile:
        old, new = before.exits[index], now.exits[index]
        counts = _add(old.confidence_counts, new.confidence_counts, share)
        agreements = _add(old.agreement_counts, new.agreement_counts, share)
        nats_per_byte = _ratio(samples, index)
        threshold = new.threshold
        if target_agreement is not None and index < len(now.exits) - 1:
            threshold = calibrated_threshold(_EDGES, counts, agreements, target_agreement)
        return new.model_copy(
            update={
                "threshold": threshold,
                "confidence_counts": counts,
                "agreement_counts": agreements,
                "nats_per_byte": nats_per_byte,
                "perplexity": math.exp(nats_per_byte * bytes_per_token),
            }
        )

    # The mean over all requests. Each side is weighted by the length of its text.
    weights = (sum(one.text_bytes for one in kept), sum(one.text_bytes for one in now.samples))
    tokens = weights[0] / before.bytes_per_token + weights[1] / now.bytes_per_token
    bytes_per_token = sum(weights) / tokens
    exits = tuple(together(index) for index in range(len(now.exits)))
    return now.model_copy(
        update={
            "requests": len(samples),
            "tokens": exits[-1].tokens,
            "bytes_per_token": bytes_per_token,
            "exits": exits,
            "samples": samples,
        }
    )


def _series(samples: Sequence[RequestSample]) -> Iterator[list[float]]:
    """Values per request, in nats per byte: the last layer, and each exit minus the last layer."""
    known = [sample for sample in samples if sample.text_bytes]
    yield [sample.nats[-1] / sample.text_bytes for sample in known]
    for index in range(len(samples[0].nats) - 1):
        yield [(sample.nats[index] - sample.nats[-1]) / sample.text_bytes for sample in known]


def _sigmas(old: Sequence[float], new: Sequence[float]) -> float:
    """Distance between two means in standard errors (Welch)."""
    if len(old) < 2 or len(new) < 2:
        return math.inf
    error = math.sqrt(statistics.variance(old) / len(old) + statistics.variance(new) / len(new))
    distance = abs(statistics.fmean(old) - statistics.fmean(new))
    if error == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / error


def _add(old: Sequence[int], new: Sequence[int], share: float) -> tuple[int, ...]:
    return tuple(round(one * share) + other for one, other in zip(old, new, strict=True))


def _ratio(samples: Sequence[RequestSample], index: int) -> float:
    return math.fsum(sample.nats[index] for sample in samples) / sum(one.text_bytes for one in samples)
