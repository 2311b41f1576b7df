"""Percentiles of durations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles, in milliseconds. NaN: there was nothing to measure."""

    p50: float
    p99: float
    p999: float


def latency(seconds: Sequence[float]) -> Latency:
    """P50, P99 and P99.9 of durations in seconds."""
    milliseconds = [value * 1000 for value in seconds]
    return Latency(*(percentile(milliseconds, share) for share in (0.5, 0.99, 0.999)))


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value that is not exceeded by at least `share` of all."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
