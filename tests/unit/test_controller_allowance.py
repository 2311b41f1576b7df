"""The controller's allowance: the share of the fleet's CPU that profiling may take."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.allowance import MOST_AHEAD, Allowance


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_evaluation_is_paid_off_before_the_next_begins() -> None:
    clock = _Clock()
    allowance = Allowance(0.02, clock)
    assert allowance.permits(urgent=False)
    allowance.spend(0.4, threads=2)
    assert allowance.wait_seconds == 10
    clock.now = 9.9
    assert not allowance.permits(urgent=False)
    clock.now = 10
    assert allowance.permits(urgent=False)


def test_a_few_urgent_ones_go_ahead_and_the_next_pays_for_all() -> None:
    clock = _Clock()
    allowance = Allowance(0.02, clock)
    allowance.spend(0.4, threads=2)
    for _ in range(MOST_AHEAD):
        assert not allowance.permits(urgent=False)
        assert allowance.permits(urgent=True)
        allowance.spend(0.4, threads=2)
    assert not allowance.permits(urgent=True)
    assert allowance.wait_seconds == 10 * (1 + MOST_AHEAD)
    clock.now = allowance.wait_seconds
    assert allowance.permits(urgent=False)
    allowance.spend(0.4, threads=2)
    assert allowance.permits(urgent=True)


def test_a_share_of_one_never_waits() -> None:
    allowance = Allowance(1, _Clock())
    allowance.spend(100, threads=1)
    assert allowance.permits(urgent=False)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 2), st.booleans()), min_size=1, max_size=60),
    st.floats(0.005, 0.5),
    st.integers(1, 8),
)
def test_however_often_it_is_asked_the_share_holds(
    asked: Sequence[tuple[float, float, bool]], share: float, threads: int
) -> None:
    """All evaluations are paid for, except the last MOST_AHEAD, which may go ahead, and the one before."""
    clock = _Clock()
    allowance = Allowance(share, clock)
    spent: list[float] = []
    for pause, cost, urgent in asked:
        clock.now += pause
        if allowance.permits(urgent=urgent):
            assert sum(spent[: -MOST_AHEAD - 1]) <= share * threads * clock.now + 1e-9
            allowance.spend(cost, threads)
            spent.append(cost)
