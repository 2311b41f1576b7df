"""A sequential test for a change of a figure that comes with every request: CUSUM (Page 1954), on both sides.

It adds up how far the figure is from what was expected, less a slack. A sum that reaches a limit is an alarm.
A large change is noticed within a few requests, a small one later, and chance rarely causes an alarm.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

# Requests from which the expectation is no longer refined by what is served: a slow drift would be learnt.
_LEARNT = 50.0
# Requests up to which it is refined in any case; from then on not by what may be a drift.
_UNSURE = 10.0
# Share of the limit that a sum reaches by chance often; from then on requests count as those of a change.
_BEGUN = 0.25
# A single request counts as at most so many standard deviations: one odd prompt is no drift.
_CLIP = 3.0
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
    """When something was: requests finished by then, and seconds on the caller's clock."""

    requests: int
    seconds: float


class Cusum:
    """The test of one figure. What it expects is refined by the first requests that are served."""

    def __init__(self, mean: float, deviation: float, weight: float) -> None:
        """mean, deviation: of one request, as expected; weight: requests that the expectation rests on."""
        self._mean = mean
        self._weight = weight
        self._spread = weight * deviation**2
        self._freedom = weight
        # How far the figure was above what was expected, and below, added up.
        self.rise = self.fall = 0.0
        # When the sums rose beyond what chance often makes of them.
        self._rise_began = self._fall_began = Moment(0, 0.0)

    def add(self, mean: float, requests: float, tuning: Tuning, until: Moment) -> None:
        """Takes in the mean figure of some requests that were served together until then."""
        deviation = math.sqrt(self._spread / self._freedom)
        if not requests or not deviation:
            return
        # What is expected is uncertain itself.
        error = deviation * math.sqrt(1 + requests / self._weight)
        distance = max(-_CLIP, min(_CLIP, (mean - self._mean) / error))
        # These requests may have begun before the change: what comes after them has not.
        if self.rise < tuning.limit * _BEGUN:
            self._rise_began = until
        if self.fall < tuning.limit * _BEGUN:
            self._fall_began = until
        self.rise = max(0.0, self.rise + requests * (distance - tuning.slack))
        self.fall = max(0.0, self.fall - requests * (distance + tuning.slack))
        is_calm = max(self.rise, self.fall) < tuning.limit / 2
        if self._weight < _UNSURE or (is_calm and self._weight < _LEARNT):
            self._learn(mean, requests)

    def _learn(self, mean: float, requests: float) -> None:
        """Welford's update, a group of requests at a time."""
        self._weight += requests
        before = mean - self._mean
        self._mean += before * requests / self._weight
        self._spread += requests * before * (mean - self._mean)
        self._freedom += 1

    @property
    def began(self) -> Moment:
        """From when on the figure surely differed, as far as can be told."""
        return self._rise_began if self.rise >= self.fall else self._fall_began
