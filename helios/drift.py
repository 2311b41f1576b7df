"""Whether the traffic has drifted between two evaluations, and what both say together while it has not.

Five requests say little: the perplexity of an exit over the last layer varies by a few per cent from one
such handful to the next, which is as much as the bound on it. Histograms stay valid while the traffic stays
(the third insight of arXiv 2504.10724), so evaluations are pooled until a test finds that it has changed.
"""

import math
import statistics
from collections.abc import Iterator, Sequence

from helios.calibration import calibrated_threshold
from helios.history import CONFIDENCE_BINS, ExitProfile, ModelProfile, RequestSample

# Standard errors between the means of the old and the new requests that are a drift. With five new ones a
# false alarm, which only costs the pool, comes once in some fifty evaluations.
DRIFT_SIGMAS = 3.5
# The same once the controller has noticed a drift: then it is the likelier case, and four requests that vary
# as much as those of the start of a phase do would hide it behind those before.
NOTICED_DRIFT_SIGMAS = 2.0
_EDGES = [index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS)]


def has_drifted(
    before: Sequence[RequestSample], now: Sequence[RequestSample], sigmas: float = DRIFT_SIGMAS
) -> bool:
    """Whether requests differ more than by chance: in what the last layer makes of them, or in what any exit
    loses against it, by `sigmas` standard errors. With fewer than two on either side nothing can be told, and
    they count as drifted."""
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
    """The profile `now`, together with what `before` holds of at most `keep` requests in all.

    Only `now` counts when the traffic has drifted, or when `before` is of other exits. Speeds, sizes and cost
    are `now`'s. target_agreement: what thresholds are calibrated to; None: they are `now`'s. is_noticed: the
    controller asks because it has noticed a drift.
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
    # Histograms are not kept by request: those that go are taken to be like those that stay.
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

    # Means over the requests that each side holds.
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
    """Per request in nats per byte: the last layer, and each exit over the last layer."""
    known = [sample for sample in samples if sample.text_bytes]
    yield [sample.nats[-1] / sample.text_bytes for sample in known]
    for index in range(len(samples[0].nats) - 1):
        yield [(sample.nats[index] - sample.nats[-1]) / sample.text_bytes for sample in known]


def _sigmas(old: Sequence[float], new: Sequence[float]) -> float:
    """Distance of two means in standard errors (Welch)."""
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
