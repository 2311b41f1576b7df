"""The confidence threshold above which an exit's tokens can be trusted."""

from collections.abc import Sequence

# Share of tokens that must agree with the last layer, unless the operator says otherwise.
TARGET_AGREEMENT = 0.9


def calibrated_threshold(
    confidences: Sequence[float],
    counts: Sequence[int],
    agreements: Sequence[int],
    target: float = TARGET_AGREEMENT,
) -> float:
    """The lowest confidence such that at least `target` of the tokens from it on agree with the last layer.

    confidences: ascending levels of a histogram (lower edges of its bins) or single values. counts: tokens at
    each level. agreements: those of them whose top token is also the last layer's. A level without tokens is
    never the answer. Returns 1.0 when there is no such confidence.
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
