import pytest

from helios.rates import WINDOW_TOKENS, rates
from helios.v1.worker_pb2 import Telemetry


def test_rates_are_what_happened_between_two_messages() -> None:
    before = Telemetry(time=10.0, generated_tokens=100, high_exit_tokens=20, running=4)
    now = Telemetry(time=12.0, generated_tokens=300, high_exit_tokens=70, running=4)
    found = rates(now, before)
    assert (found.tokens, found.tokens_per_second) == (200, 100.0)
    # Four streams share 100 tokens a second.
    assert found.tpot_seconds == pytest.approx(0.04)
    assert found.cbc == pytest.approx(0.25 * WINDOW_TOKENS)


@pytest.mark.parametrize(
    "before",
    [
        None,
        Telemetry(time=12.0, generated_tokens=300),
        # Another process with the same name, whose counters began at zero.
        Telemetry(time=10.0, generated_tokens=900),
    ],
)
def test_nothing_is_said_where_nothing_can_be_compared(before: Telemetry | None) -> None:
    found = rates(Telemetry(time=12.0, generated_tokens=300), before)
    assert found.tokens_per_second == 0
    assert found.tpot_seconds is None
    assert found.cbc is None
