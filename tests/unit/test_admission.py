"""Admission: limits always hold, and a refusal says when to retry."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import OverloadedError
from services.gateway.admission import Admission, EventRate
from services.gateway.settings import GatewaySettings


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.sampled_from(["enter", "first token", "leave"])))
def test_the_limits_hold_and_every_place_is_given_back(events: list[str]) -> None:
    settings = GatewaySettings(max_open_streams=5, max_queued_streams=3)
    admission = Admission(settings)
    streams = []
    for event in events:
        if event == "enter":
            stack = ExitStack()
            try:
                place = stack.enter_context(admission.admit())
            except OverloadedError:
                queued = sum(place.queued for _, place in streams)
                assert len(streams) == 5 or queued == 3, "only a full gateway refuses"
            else:
                streams.append((stack, place))
        elif streams and event == "first token":
            streams[0][1].first_token()
        elif streams:
            streams.pop(0)[0].close()
        assert admission.open_streams == len(streams) <= 5
        assert admission.queued_streams == sum(place.queued for _, place in streams) <= 3
    for stack, _ in streams:
        stack.close()
    assert admission.open_streams == admission.queued_streams == 0


def test_a_failed_stream_gives_its_place_back() -> None:
    admission = Admission(GatewaySettings())
    with pytest.raises(RuntimeError), admission.admit():
        raise RuntimeError("the stream failed")
    assert admission.open_streams == admission.queued_streams == 0


def test_the_first_refusal_hints_the_configured_time() -> None:
    admission = Admission(GatewaySettings(max_queued_streams=1, overload_retry_seconds=3))
    with admission.admit(), pytest.raises(OverloadedError) as refused, admission.admit():
        pass
    assert refused.value.retry_after_seconds == 3


@pytest.mark.parametrize(("gap", "at_least", "at_most"), [(0.2, 0.1, 0.4), (2, 1.5, 3), (1000, 30, 30)])
def test_a_hint_follows_the_rate_at_which_places_become_free(
    gap: float, at_least: float, at_most: float
) -> None:
    clock = Clock()
    admission = Admission(GatewaySettings(max_queued_streams=1), clock)
    for _ in range(100):
        with admission.admit():
            clock.now += gap
    with admission.admit(), pytest.raises(OverloadedError) as refused:
        clock.now += gap
        admission.admit().__enter__()
    assert at_least <= refused.value.retry_after_seconds <= at_most


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=50))
def test_a_rate_estimate_grows_while_nothing_happens(gaps: list[float]) -> None:
    rate = EventRate(window_seconds=10)
    now = 0.0
    for gap in gaps:
        now += gap
        rate.observe(now)
    soon, later = rate.seconds_between(now + 1), rate.seconds_between(now + 5)
    assert soon is not None
    assert later is not None
    assert 0 < soon < later
