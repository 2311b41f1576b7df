"""A two-sided sequential test for a change in a figure that comes with every request: CUSUM (Page 1954).

It adds up the distance of the figure from its expectation, minus a slack. It raises the alarm when the sum
reaches a limit. It notices a large change within a few requests, a small one later, and chance rarely raises
an alarm.

Two tests run side by side. One is tuned for large changes, which it notices soon, the other for smaller ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Delays of the tests, as multiples of the requested delay.
_SCALES = (1.0, 4.0)
# After this many requests the expectation is no longer refined, because it would learn a slow drift.
_LEARNT = 50.0
# Up to this many requests it is always refined, later only while nothing looks like a drift.
_UNSURE = 10.0
# Chance often raises a sum up to this share of the limit. Only above it do requests count as part of a
# change.
_BEGUN = 0.25
# A request's distance is cut at this many standard deviations, because one odd prompt is not a drift.
_CLIP = 3.0
# A deviation of up to this many standard errors of the expectation does not count as a change.
_DOUBT = 0.5
# Correction for the overshoot of a sum over its limit (Siegmund, Sequential Analysis, 1985).
_OVERSHOOT = 1.166


@dataclass(frozen=True, slots=True)
class Tuning:
    """The settings of a test. Both values are in standard deviations of one request."""

    slack: float
    """Half of the smallest change that is noticed within the delay."""
    limit: float
    """Sum at which the test raises the alarm."""

    @classmethod
    def of(cls, false_alarm_requests: float, delay_requests: float) -> "Tuning":
        """The tuning that gives one false alarm in `false_alarm_requests`.

        It notices a change after `delay_requests` on average. The smallest change for which both hold is
        derived from them.
        """
        low, high = 0.05, 3.0
        for _ in range(40):
            slack = (low + high) / 2
            # A change of twice the slack raises the sum as fast as no change lowers it.
            if _mean_run(-slack, _limit(slack, false_alarm_requests)) > delay_requests:
                low = slack
            else:
                high = slack
        return cls(high, _limit(high, false_alarm_requests))


def tunings(false_alarm_requests: float, delay_requests: float) -> tuple[Tuning, ...]:
    """The tunings of all tests, which together give one false alarm in `false_alarm_requests`.

    The first test has the delay `delay_requests`, the second a multiple of it.
    """
    apart = false_alarm_requests * len(_SCALES)
    return tuple(Tuning.of(apart, delay_requests * scale) for scale in _SCALES)


def _mean_run(slack: float, limit: float) -> float:
    """Mean requests until an alarm, for a figure whose mean is `slack` below the slack (Siegmund 1985)."""
    reach = limit + _OVERSHOOT
    exponent = min(2 * slack * reach, 700.0)
    return (math.exp(exponent) - exponent - 1) / (2 * slack * slack)


def _limit(slack: float, false_alarm_requests: float) -> float:
    low, high = 0.0, 1000.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_run(slack, middle) < false_alarm_requests else (low, middle)
    return high


class Moment(NamedTuple):
    """A point in time: the number of requests so far, and seconds on the caller's clock."""

    requests: int
    seconds: float


class _Sum:
    """The accumulated distance of a figure in one direction."""

    def __init__(self) -> None:
        self.value = 0.0
        # The sum as a share of the limit. 1 is an alarm.
        self.share = 0.0
        # When it rose above the level that chance often reaches. This is when the change began.
        self.began = Moment(0, 0.0)

    def add(self, distance: float, requests: float, tuning: Tuning, until: Moment) -> None:
        """Adds the mean `distance` of some requests, in standard deviations in this direction.

        until: when these requests had come.
        """
        # These requests may still be from before the change, but later ones are not.
        if self.value < tuning.limit * _BEGUN:
            self.began = until
        self.value = max(0.0, self.value + requests * (distance - tuning.slack))
        self.share = self.value / tuning.limit


class Cusum:
    """The tests of one figure. The first requests that are served refine its expected value."""

    def __init__(self, mean: float, deviation: float, weight: float) -> None:
        """mean, deviation: expected values of one request. weight: number of requests behind these values."""
        self._mean = mean
        self._weight = weight
        self._spread = weight * deviation**2
        self._freedom = weight
        # For each test, one sum for values above the expectation and one for values below it.
        self._rises = [_Sum() for _ in _SCALES]
        self._falls = [_Sum() for _ in _SCALES]

    @property
    def rise(self) -> float:
        """How far the figure is above the expectation. 1 is an alarm."""
        return max(one.share for one in self._rises)

    @property
    def fall(self) -> float:
        """How far the figure is below the expectation. 1 is an alarm."""
        return max(one.share for one in self._falls)

    @property
    def began(self) -> Moment:
        """When the figure began to differ, as far as this can be told."""
        return max(self._rises + self._falls, key=lambda one: one.share).began

    def add(self, mean: float, requests: float, tuned: Sequence[Tuning], until: Moment) -> None:
        """Adds the mean figure of some requests that were served together.

        `until`: when they had come.
        """
        deviation = math.sqrt(self._spread / self._freedom)
        if not requests or not deviation:
            return
        # The expectation is itself uncertain.
        error = deviation * math.sqrt(1 + requests / self._weight)
        distance = max(-_CLIP, min(_CLIP, (mean - self._mean) / error))
        # A small error of the expected mean must not add up.
        doubt = _DOUBT / math.sqrt(self._weight)
        for tuning, rise, fall in zip(tuned, self._rises, self._falls, strict=True):
            rise.add(distance - doubt, requests, tuning, until)
            fall.add(-distance - doubt, requests, tuning, until)
        is_calm = max(self.rise, self.fall) < 1 / 2
        if self._weight < _UNSURE or (is_calm and self._weight < _LEARNT):
            self._learn(mean, requests)

    def _learn(self, mean: float, requests: float) -> None:
        """Welford's update for a group of requests."""
        self._weight += requests
        before = mean - self._mean
        self._mean += before * requests / self._weight
        self._spread += requests * before * (mean - self._mean)
        self._freedom += 1
