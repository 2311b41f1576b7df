"""The CUSUM test: how soon it notices a change of a figure, and how rare false alarms are."""

import random
import statistics
from collections.abc import Sequence

import pytest

from services.controller.cusum import Cusum, Moment, Tuning, tunings

TUNED = tunings(1e4, 10)
# The tuning of a single test.
TUNING = Tuning.of(1e4, 20)
ALIKE = (TUNING, TUNING)


def run(
    test: Cusum,
    dice: random.Random,
    mean: float,
    most: int,
    first: int = 0,
    tuned: Sequence[Tuning] = TUNED,
) -> int | None:
    """Requests until an alarm. None: there was no alarm in `most` requests."""
    for count in range(first, first + most):
        test.add(dice.gauss(mean, 1), 1, tuned, Moment(count + 1, float(count + 1)))
        if max(test.rise, test.fall) >= 1:
            return count + 1 - first
    return None


@pytest.mark.parametrize("shift", [-4.0, 4.0])
def test_a_large_change_is_noticed_within_a_few_requests_to_either_side(shift: float) -> None:
    began = []
    for seed in range(20):
        dice, test = random.Random(seed), Cusum(0, 1, 25)
        assert run(test, dice, 0, 100) is None
        delay = run(test, dice, shift, 100, first=100)
        assert delay is not None
        assert delay <= 6
        assert (test.rise if shift > 0 else test.fall) >= 1
        began.append(test.began.requests)
    assert 100 <= statistics.median(began) <= 102


def test_the_smallest_change_is_noticed_after_about_the_delay_asked_for() -> None:
    # The change is twice the slack.
    change = 2 * TUNING.slack
    delays = [run(Cusum(0, 1, 1e6), random.Random(seed), change, 10_000, tuned=ALIKE) for seed in range(200)]
    found = [delay for delay in delays if delay is not None]
    assert len(found) == len(delays)
    assert statistics.fmean(found) == pytest.approx(20, rel=0.3)


def test_a_smaller_change_is_noticed_by_the_test_with_more_patience() -> None:
    quick = TUNED[:1] * 2
    change = 2 * TUNED[1].slack
    for seed in range(20):
        found = run(Cusum(0, 1, 1e6), random.Random(seed), change, 10_000)
        alone = run(Cusum(0, 1, 1e6), random.Random(seed), change, 10_000, tuned=quick)
        assert found is not None
        assert alone is None or found <= alone
    assert TUNED[1].slack < TUNED[0].slack / 1.5


def test_false_alarms_are_about_as_rare_as_asked_for() -> None:
    tuned = tunings(500, 10)
    runs = []
    for seed in range(60):
        dice, test, count = random.Random(seed), Cusum(0, 1, 1e6), 0
        while test.rise < 1:
            test.add(dice.gauss(0, 1), 1, tuned, Moment(count, 0.0))
            count += 1
        runs.append(count)
    # Winsorizing makes false alarms rarer than planned.
    assert 350 < statistics.fmean(runs) < 1500


def test_rarer_false_alarms_and_longer_delays_both_raise_the_limit() -> None:
    assert Tuning.of(1e6, 20).limit > Tuning.of(1e4, 20).limit
    assert Tuning.of(1e4, 40).limit > Tuning.of(1e4, 20).limit
    assert Tuning.of(1e4, 40).slack < Tuning.of(1e4, 20).slack


def test_one_odd_request_is_no_alarm() -> None:
    test = Cusum(0, 1, 25)
    test.add(1e9, 1, TUNED, Moment(0, 0.0))
    assert 0 < test.rise < 1


def test_a_wrong_expectation_is_learnt_where_it_rests_on_little() -> None:
    tuned, alarms = tunings(1e5, 20), 0
    for seed in range(100):
        dice, test = random.Random(seed), Cusum(0.8, 1, 1)
        for count in range(200):
            test.add(dice.gauss(0, 1), 1, tuned, Moment(count, 0.0))
        alarms += max(test.rise, test.fall) >= 1
    assert alarms <= 15


def test_what_may_be_a_drift_is_not_learnt() -> None:
    """The traffic changes right after the test began."""
    for seed in range(20):
        delay = run(Cusum(0, 1, 25), random.Random(seed), 2.5, 100)
        assert delay is not None
        assert delay <= 12


def test_a_group_of_requests_counts_as_so_many() -> None:
    one, many = Cusum(0, 1, 1e6), Cusum(0, 1, 1e6)
    for count in range(4):
        one.add(1.5, 1, TUNED, Moment(count, 0.0))
    many.add(1.5, 4, TUNED, Moment(0, 0.0))
    assert many.rise == pytest.approx(one.rise, rel=1e-4)
