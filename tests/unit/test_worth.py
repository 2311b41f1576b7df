"""The sentence that says what a model's exits are worth."""

import pytest

from helios.worth import worth
from tests.profiles import exit_profile, model_profile


def test_the_shallowest_exit_within_the_bound_is_named_with_what_it_brings() -> None:
    exits = [exit_profile(6, 0.80), exit_profile(8, 0.61), exit_profile(10, 0.605), exit_profile(12, 0.60)]
    said = worth(model_profile("m", exits), bound=0.05)
    # Four bytes per token: 4 x 0.01 nats are 4.1 %.
    assert said == (
        "Depth 8 of 12 is the shallowest of m within +5% perplexity (+4.1% and 90% of tokens as the last "
        "layer's). With 4 layers less, steps are 1.50 times as fast at batch 1 and 1.50 times as fast at "
        "batch 16."
    )


def test_a_model_whose_exits_lose_too_much_is_said_not_to_pay() -> None:
    exits = [
        exit_profile(6, 0.90, agreement=0.3),
        exit_profile(10, 0.65, agreement=0.7),
        exit_profile(12, 0.60),
    ]
    said = worth(model_profile("m", exits), bound=0.05)
    assert said.startswith("No exit of m pays: none is within +5% perplexity.")
    assert "depth 10 of 12, with +22.1% and 70% of tokens" in said
    assert worth(model_profile("m", exits), bound=0.25).startswith("Depth 10 of 12 is the shallowest")


def test_an_exit_that_is_not_faster_is_said_to_bring_nothing() -> None:
    exits = [exit_profile(11, 0.60, step_seconds=0.012), exit_profile(12, 0.60, step_seconds=0.012)]
    said = worth(model_profile("m", exits), bound=0.05)
    assert "but it brings nothing: with 1 layer less" in said


def test_a_model_without_exits_names_the_command_that_trains_them() -> None:
    said = worth(model_profile("m", [exit_profile(12, 0.6)]), bound=0.05)
    assert said.startswith("m has no exits before its last layer (12)")
    assert "`helios models add-exits`" in said


def test_an_exit_that_predicts_nothing_has_a_finite_increase() -> None:
    profile = model_profile("m", [exit_profile(6, 1000.0), exit_profile(12, 0.6)])
    assert profile.perplexity_increase(profile.exits[0]) == pytest.approx(1.0142320547350045e304)
