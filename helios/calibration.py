"""The confidence at which an exit's tokens can be trusted."""

from collections.abc import Sequence

# The threshold of an exit that is neither calibrated nor set (TH in arXiv 2504.10724).
DEFAULT_THRESHOLD = 0.8
# Share of tokens that must agree with the last layer, unless the operator sets another one.
TARGET_AGREEMENT = 0.9


def calibrated_threshold(
    confidences: Sequence[float],
    counts: Sequence[int],
    agreements: Sequence[int],
    target: float = TARGET_AGREEMENT,
) -> float:
    """The lowest confidence at and above which at least `target` of the tokens agree with the last layer.

    confidences: ascending; the lower edges of a histogram's bins, or single values. counts: the number of
    tokens at each confidence. agreements: how many of them have the last layer's top token. A confidence
    without tokens is never returned. Returns 1.0 when no confidence qualifies.
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
