"""The size of chunks follows from the measured times of steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.engine.evaluation.space import sequence_of
from helios.engine.scheduling.chunk_budget import ChunkBudget
from helios.served import ServedPlan
from tests.opt_variants import byte_tokenizer


def observed(stretch: float) -> ChunkBudget:
    """Steps take 10 ms for up to 8 sequences, 40 ms for 32, and a prompt's token 0.1 ms."""
    budget = ChunkBudget(stretch, 16, 512)
    budget.observe(0, 512, 512 * 1e-4)
    for _ in range(3):
        budget.observe(8, 0, 0.010)
        budget.observe(32, 0, 0.040)
    return budget


@pytest.mark.parametrize(("decoding", "tokens"), [(8, 150), (15, 150), (32, 512), (60, 512), (0, 512)])
def test_a_chunk_fits_into_what_the_stretch_leaves(decoding: int, tokens: int) -> None:
    assert observed(2.5).tokens(decoding) == pytest.approx(tokens, abs=1)


def test_steps_that_the_machine_delayed_do_not_make_room() -> None:
    budget = observed(2.5)
    for seconds in (0.1, 0.010, 0.010, 0.010, 0.010) * 20:
        budget.observe(8, 0, seconds)
    assert budget.tokens(8) < 200


def test_the_fixed_time_of_a_prefill_does_not_make_chunks_smaller() -> None:
    budget = observed(2.5)
    # Besides 0.1 ms a token, each prefill takes 10 ms.
    for tokens in (16, 96, 16, 16, 40) * 20:
        budget.observe(8, tokens, 0.010 + 0.010 + tokens * 1e-4)
    assert budget.tokens(8) == pytest.approx(150, rel=0.1)


def test_prefills_that_the_machine_delayed_do_not_make_chunks_smaller() -> None:
    budget = observed(2.5)
    for tokens, delay in ((16, 0.1), (96, 0.0), (32, 0.0), (96, 0.0), (40, 0.0)) * 20:
        budget.observe(8, tokens, 0.010 + delay + tokens * 1e-4)
    assert budget.tokens(8) > 100


def test_a_bound_that_leaves_nothing_leaves_the_least() -> None:
    assert observed(1.0001).tokens(8) == 16


def test_those_who_wait_count_as_much_as_those_who_decode() -> None:
    budget = observed(2.5)
    assert budget.tokens(8, 4) == budget.tokens(8, 8) == budget.tokens(8)
    assert budget.tokens(8, 24) == pytest.approx(3 * 150, abs=3)
    assert budget.tokens(8, 64) == 512


def test_no_bound_is_the_whole_step() -> None:
    assert observed(math.inf).tokens(8) == 512


def test_a_size_that_is_not_known_is_told_by_a_step_without_prompts() -> None:
    budget = ChunkBudget(2.5, 16, 512)
    assert budget.tokens(3) == 0
    budget.observe(3, 0, 0.010)
    # The time of a prompt token is not known either.
    assert budget.tokens(3) == budget.tokens(2) == 16
    assert budget.tokens(4) == 0


def test_what_is_known_of_a_plan_is_expected_of_the_next_while_sequences_move() -> None:
    budget = ChunkBudget(2.5, 16, 512)
    budget.expect(observed(2.5), 0.5)
    # Decode steps and prompts are expected to take half as long.
    assert budget.decode_seconds(8) == pytest.approx(0.005)
    assert budget.tokens(8) == pytest.approx(150, abs=1)
    assert budget.tokens(1) == 0, "no plan has told"
    budget.observe(8, 0, 0.020)
    assert budget.decode_seconds(8) == pytest.approx(0.020)
    assert budget.tokens(32) > 0
    budget.settle()
    assert budget.tokens(32) == 0, "not observed yet"
    assert budget.decode_seconds(8) == pytest.approx(0.020)
    # Times that were only expected are not passed on as expectations.
    again = ChunkBudget(2.5, 16, 512)
    again.expect(budget, 1)
    assert again.decode_seconds(8) == pytest.approx(0.020)
    assert again.decode_seconds(32) is None


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 512), st.floats(0, 10)), max_size=30), st.data())
def test_whatever_steps_took_a_chunk_is_within_its_bounds(
    steps: list[tuple[int, int, float]], data: st.DataObject
) -> None:
    budget = ChunkBudget(data.draw(st.floats(1.001, 100)), 16, 512)
    for decoding, prompt_tokens, seconds in steps:
        budget.observe(decoding, prompt_tokens, seconds)
    decoding = data.draw(st.integers(1, 64))
    assert budget.tokens(decoding) == 0 or 16 <= budget.tokens(decoding) <= 512
    budget.observe(decoding, 0, data.draw(st.floats(0, 10)))
    assert 16 <= budget.tokens(decoding) <= 512


def test_steps_of_other_plans_are_compared_by_what_their_sequences_cost() -> None:
    deep, shallow = (ServedPlan(model="a", depth=depth) for depth in (8, 2))
    budget = ChunkBudget(2.5, 16, 512, {deep: 1.0, shallow: 0.25})
    sequences = [sequence_of(plan, byte_tokenizer(), [2], []) for plan in (deep, shallow)]
    assert [budget.cost(decoding) for decoding in (sequences, sequences[1:], [])] == [0.625, 0.25, 1.0]
    budget.observe(4, 0, 0.1, cost=0.25)
    assert budget.decode_seconds(4) == pytest.approx(0.4)
    assert budget.decode_seconds(4, cost=0.625) == pytest.approx(0.25)
    budget.observe(4, 100, 0.5, cost=1.0)
    # One prompt token takes a millisecond, and the step may take 1.5 times as long as its decodes more.
    assert budget.tokens(4, cost=0.5) == 300
    assert budget.tokens(4, cost=0.25) == 150
