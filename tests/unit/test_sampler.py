"""Tokens follow the distribution that was asked for, and depend on (seed, position) alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from helios.engine.readout import read
from helios.engine.sampler import Row, Sampled, sample, uniform
from helios.sampling import SamplingParams

VOCABULARY = 50


def logits_of(seed: int, rows: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def draw(logits: torch.Tensor, rows: list[Row]) -> Sampled:
    return sample(read(logits), dict(enumerate(rows)))


def reference(logits: torch.Tensor, sampling: SamplingParams, history: list[int]) -> torch.Tensor:
    """The probabilities that transformers would draw from: [vocabulary]."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return steps(torch.tensor([history]), logits).softmax(-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.7, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.8),
        SamplingParams(temperature=1.0, repetition_penalty=1.8),
        SamplingParams(temperature=0.9, top_k=9, top_p=0.95, repetition_penalty=0.7),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers(sampling: SamplingParams) -> None:
    logits = logits_of(3)
    history = [1, 2, 3, 3, 40]
    draws = 20_000
    rows = [Row(sampling, position, history) for position in range(draws)]
    counts = torch.bincount(
        torch.tensor(draw(logits.expand(draws, -1), rows).token_ids), minlength=VOCABULARY
    )
    expected = reference(logits, sampling, history) * draws
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = (((counts - expected) ** 2)[possible] / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    # 6 standard deviations of the chi-squared distribution: fixed seeds, so this never flickers.
    assert chi2 < freedom + 6 * math.sqrt(2 * max(freedom, 1))


def test_greedy_logprob_and_confidence_are_the_models_own() -> None:
    logits = logits_of(4, rows=3)
    rows = [Row(SamplingParams(temperature=t, top_k=1), 0, []) for t in (0.0, 0.0, 0.3)]
    sampled = draw(logits, rows)
    log_softmax = logits.log_softmax(-1)
    assert sampled.token_ids == logits.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(sampled.logprobs), log_softmax.amax(-1))
    torch.testing.assert_close(torch.tensor(sampled.confidences), log_softmax.amax(-1).exp())


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2048),
    st.integers(0, 30),
    st.floats(0.01, 5),
    st.floats(0.05, 1),
    st.integers(0, 60),
)
def test_a_draw_depends_on_its_row_alone(
    seed: int, position: int, place: int, temperature: float, top_p: float, top_k: int
) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    logits = logits_of(5, rows=31)
    others = [Row(SamplingParams(temperature=0.1 * i, top_k=i, seed=i), i, []) for i in range(31)]
    batch = [*others]
    batch[place] = Row(sampling, position, [])
    together = draw(logits, batch)
    alone = draw(logits[place : place + 1], [Row(sampling, position, [])])
    assert together.token_ids[place] == alone.token_ids[0]


def test_a_wide_nucleus_in_a_large_vocabulary_is_found() -> None:
    logits = 0.01 * logits_of(6, vocabulary=5000)
    sampling = SamplingParams(temperature=1.0, top_p=0.9)
    rows = [Row(sampling, position, []) for position in range(2000)]
    drawn = draw(logits.expand(2000, -1), rows).token_ids
    allowed = reference(logits, sampling, [0]) > 0
    assert allowed[drawn].all()
    assert 4000 < int(allowed.sum()) < 5000


def test_temperatures_near_zero_are_greedy_and_finite() -> None:
    logits = logits_of(7)
    rows = [Row(SamplingParams(temperature=1e-30), 0, [])]
    assert draw(logits, rows).token_ids == logits.argmax(-1).tolist()


@given(st.integers(0, 2**64 - 1), st.integers(0, 100_000))
def test_uniform_is_in_range_and_repeatable(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)


def test_uniform_is_uniform_along_seeds_and_positions() -> None:
    for values in ([uniform(s, 7) for s in range(20_000)], [uniform(7, p) for p in range(20_000)]):
        counts = torch.histc(torch.tensor(values), bins=20, min=0, max=1)
        chi2 = float(((counts - 1000) ** 2 / 1000).sum())
        assert chi2 < 19 + 6 * math.sqrt(2 * 19)
