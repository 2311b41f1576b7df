"""Evaluations are pooled while the traffic stays the same. After a drift only the last one counts."""

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.drift import has_drifted, pooled
from helios.history import ModelProfile, RequestSample
from tests.profiles import exit_profile, model_profile

KEEP = 20
TARGET = 0.9


def sample(name: str, *nats_per_byte: float, text_bytes: int = 100) -> RequestSample:
    return RequestSample(
        id=name, text_bytes=text_bytes, nats=tuple(rate * text_bytes for rate in nats_per_byte)
    )


def requests(first: int, count: int, mean: float, noise: float = 0.05) -> list[RequestSample]:
    """Requests with `mean` nats per byte at the last layer, and 0.01 more at the exit before it."""
    dice = random.Random(first)
    found = []
    for number in range(first, first + count):
        full = mean + dice.gauss(0, noise)
        found.append(sample(str(number), full + 0.01 + dice.gauss(0, noise / 10), full))
    return found


def profile(samples: Sequence[RequestSample], *, sure: float = 0.8) -> ModelProfile:
    text_bytes = sum(one.text_bytes for one in samples)
    exits = [
        exit_profile(depth, math.fsum(one.nats[index] for one in samples) / text_bytes, sure=sure)
        for index, depth in enumerate((2, 4))
    ]
    made = model_profile("m", exits)
    return made.model_copy(update={"samples": tuple(samples), "requests": len(samples)})


def test_evaluations_of_the_same_traffic_are_pooled() -> None:
    before, now = profile(requests(0, 5, 1.0), sure=0.6), profile(requests(5, 5, 1.0), sure=0.8)
    both = pooled(before, now, KEEP, TARGET)
    assert both.requests == 10
    assert [one.id for one in both.samples] == [str(number) for number in range(10)]
    mean = (before.full.nats_per_byte + now.full.nats_per_byte) / 2
    assert both.full.nats_per_byte == pytest.approx(mean)
    assert both.full.perplexity == pytest.approx(math.exp(mean * both.bytes_per_token))
    assert both.exits[0].share_above(0.5) == pytest.approx(0.7)
    assert both.tokens == both.full.tokens == 2000
    assert both.exits[0].decode == now.exits[0].decode


def test_after_a_drift_only_the_last_evaluation_counts() -> None:
    now = profile(requests(5, 5, 1.5))
    assert pooled(profile(requests(0, 20, 1.0)), now, KEEP, TARGET) == now


def test_a_drift_that_only_an_exit_feels_is_one() -> None:
    """The last layer is as good as before, but the exit is worse."""
    now = [sample(one.id, one.nats[1] / 100 + 0.2, one.nats[1] / 100) for one in requests(5, 5, 1.0)]
    assert has_drifted(requests(0, 20, 1.0), now)


def test_a_drift_that_was_noticed_needs_less_to_be_believed() -> None:
    before = profile(requests(0, 12, 1.0))
    # One of the four is much harder than the others, so their mean says little by itself.
    now = profile(
        [sample("a", 1.06, 1.05), sample("b", 1.1, 1.08), sample("c", 1.2, 1.1), sample("d", 2.2, 1.2)]
    )
    assert pooled(before, now, KEEP, TARGET).requests == 16
    assert pooled(before, now, KEEP, TARGET, is_noticed=True) == now
    alike = profile(requests(12, 4, 1.0))
    assert pooled(before, alike, KEEP, TARGET, is_noticed=True).requests == 16


def test_the_oldest_requests_go_and_their_share_of_the_histogram() -> None:
    both = pooled(profile(requests(0, 20, 1.0)), profile(requests(20, 5, 1.0)), KEEP, TARGET)
    assert [one.id for one in both.samples] == [str(number) for number in range(5, 25)]
    assert both.full.tokens == 1000 * 15 // 20 + 1000


def test_a_request_that_comes_again_counts_once() -> None:
    before, now = profile(requests(0, 5, 1.0)), profile(requests(0, 5, 1.0)[2:] + requests(5, 3, 1.0))
    both = pooled(before, now, KEEP, TARGET)
    assert sorted(one.id for one in both.samples) == [str(number) for number in range(8)]


def test_nothing_is_pooled_with_other_exits_or_nothing() -> None:
    now = profile(requests(5, 5, 1.0))
    assert pooled(None, now, KEEP, TARGET) == now
    other = now.model_copy(update={"exits": now.exits[1:], "samples": ()})
    assert pooled(other, now, KEEP, TARGET) == now


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_noise_of_the_same_traffic_is_rarely_taken_for_a_drift(seed: int) -> None:
    dice = random.Random(seed)
    alarms = 0
    for number in range(40):
        first = dice.randrange(10**6)
        alarms += has_drifted(requests(first, 20, 1.0), requests(first + 50 + number, 5, 1.0))
    assert alarms <= 12
