"""The confidence from which an exit's tokens can be trusted."""

from collections.abc import Sequence

# The threshold of an exit that is neither calibrated nor set (TH in arXiv 2504.10724).
DEFAULT_THRESHOLD = 0.8
# Share of tokens that have to agree with the last layer, unless the operator says otherwise.
TARGET_AGREEMENT = 0.9


def calibrated_threshold(
    confidences: Sequence[float],
    counts: Sequence[int],
    agreements: Sequence[int],
    target: float = TARGET_AGREEMENT,
) -> float:
    """The lowest confidence at and above which at least `target` of the tokens agree with the last layer.

    confidences: ascending; the lower edges of a histogram's bins, or single values. counts, agreements: at
    each confidence the number of tokens, and of those whose top token is the last layer's. A level without
    tokens is never the answer. Returns 1.0 when there is no such confidence.
    """
    threshold, tokens, agreeing = 1.0, 0, 0
    for confidence, count, agreement in zip(
        reversed(confidences), reversed(counts), reversed(agreements), strict=True
    ):
        tokens += count
        agreeing += agreement
        if count and agreeing / tokens >= target:
            threshold = confidence
    return threshold
