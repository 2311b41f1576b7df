"""A sequential test for a change of a figure that comes with every request: CUSUM (Page 1954), on both sides.

It adds up how far the figure is from what was expected, less a slack. A sum that reaches a limit is an alarm.
A large change is noticed within a few requests, a small one later, and chance rarely causes an alarm.

Two tests run side by side: one is tuned for large changes, which it notices soon, the other for smaller ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Delays of the tests, as multiples of what is asked for.
_SCALES = (1.0, 4.0)
# Requests from which the expectation is no longer refined by what is served: a slow drift would be learnt.
_LEARNT = 50.0
# Requests up to which it is refined in any case; from then on not by what may be a drift.
_UNSURE = 10.0
# Share of the limit that a sum reaches by chance often; from then on requests count as those of a change.
_BEGUN = 0.25
# A single request counts as at most so many standard deviations: one odd prompt is no drift.
_CLIP = 3.0
# Standard errors of what is expected that do not count as a change.
_DOUBT = 0.5
# Of Siegmund's correction for the overshoot of a sum over its limit (Siegmund, Sequential Analysis, 1985).
_OVERSHOOT = 1.166


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a test is set. Both are in standard deviations of one request."""

    slack: float
    """Half of the smallest change that is noticed in time."""
    limit: float
    """Sum at which the test alarms."""

    @classmethod
    def of(cls, false_alarm_requests: float, delay_requests: float) -> "Tuning":
        """For one false alarm in so many requests, and a change that is noticed after so many, on the mean.

        The smallest change for which both hold follows from them.
        """
        low, high = 0.05, 3.0
        for _ in range(40):
            slack = (low + high) / 2
            # A change of twice the slack drives the sum up as fast as its absence drives it down.
            if _mean_run(-slack, _limit(slack, false_alarm_requests)) > delay_requests:
                low = slack
            else:
                high = slack
        return cls(high, _limit(high, false_alarm_requests))


def tunings(false_alarm_requests: float, delay_requests: float) -> tuple[Tuning, ...]:
    """Of all tests, for one false alarm of any of them in so many requests. The first has this delay."""
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
    """When something was: requests that had come by then, and seconds on the caller's clock."""

    requests: int
    seconds: float


class _Sum:
    """How far a figure went to one side, added up."""

    def __init__(self) -> None:
        self.value = 0.0
        # As a share of the limit: 1 is an alarm.
        self.share = 0.0
        # When it rose beyond what chance often makes of it.
        self.began = Moment(0, 0.0)

    def add(self, distance: float, requests: float, tuning: Tuning, until: Moment) -> None:
        """distance: in standard deviations, to this side; its mean over some requests."""
        # These requests may have begun before the change: what comes after them has not.
        if self.value < tuning.limit * _BEGUN:
            self.began = until
        self.value = max(0.0, self.value + requests * (distance - tuning.slack))
        self.share = self.value / tuning.limit


class Cusum:
    """The tests of one figure. What they expect is refined by the first requests that are served."""

    def __init__(self, mean: float, deviation: float, weight: float) -> None:
        """mean, deviation: of one request, as expected; weight: requests that the expectation rests on."""
        self._mean = mean
        self._weight = weight
        self._spread = weight * deviation**2
        self._freedom = weight
        # Of each test, for a figure above what was expected, and below.
        self._rises = [_Sum() for _ in _SCALES]
        self._falls = [_Sum() for _ in _SCALES]

    @property
    def rise(self) -> float:
        """How far the figure was above what was expected, as a share of what is an alarm."""
        return max(one.share for one in self._rises)

    @property
    def fall(self) -> float:
        """The same, below."""
        return max(one.share for one in self._falls)

    @property
    def began(self) -> Moment:
        """From when on the figure surely differed, as far as can be told."""
        return max(self._rises + self._falls, key=lambda one: one.share).began

    def add(self, mean: float, requests: float, tuned: Sequence[Tuning], until: Moment) -> None:
        """Takes in the mean figure of some requests that were served together until then."""
        deviation = math.sqrt(self._spread / self._freedom)
        if not requests or not deviation:
            return
        # What is expected is uncertain itself.
        error = deviation * math.sqrt(1 + requests / self._weight)
        distance = max(-_CLIP, min(_CLIP, (mean - self._mean) / error))
        # Its mean may be off, and that would add up.
        doubt = _DOUBT / math.sqrt(self._weight)
        for tuning, rise, fall in zip(tuned, self._rises, self._falls, strict=True):
            rise.add(distance - doubt, requests, tuning, until)
            fall.add(-distance - doubt, requests, tuning, until)
        is_calm = max(self.rise, self.fall) < 1 / 2
        if self._weight < _UNSURE or (is_calm and self._weight < _LEARNT):
            self._learn(mean, requests)

    def _learn(self, mean: float, requests: float) -> None:
        """Welford's update, a group of requests at a time."""
        self._weight += requests
        before = mean - self._mean
        self._mean += before * requests / self._weight
        self._spread += requests * before * (mean - self._mean)
        self._freedom += 1
