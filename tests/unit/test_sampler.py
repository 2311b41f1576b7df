"""Tokens follow the requested distribution, and depend on (seed, position) only.

This holds for torch's sampler and for the sampler of compiled steps.
"""

import math
from collections.abc import Callable

import numpy as np
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

from helios.engine.backends.burst import draws_of
from helios.engine.backends.readout import read
from helios.engine.backends.sampler import Row, Sampled, sample
from helios.engine.kernels.layout import ALONE, Outputs
from helios.engine.kernels.sampling import draw, drawing_numbers, uniform
from helios.sampling import SamplingParams

VOCABULARY = 50


def logits_of(seed: int, rows: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def by_torch(logits: torch.Tensor, rows: list[Row]) -> Sampled:
    return sample(read(logits), dict(enumerate(rows)))


def compiled(logits: torch.Tensor, rows: list[Row]) -> Sampled:
    found = read(logits)
    room = torch.empty(drawing_numbers(logits.shape[1]))
    outputs = Outputs(
        found.logits.data_ptr(), found.best.data_ptr(), found.summaries.data_ptr(), exit_layers=0
    )
    draw(ALONE, draws_of(rows), 0, outputs, len(rows), logits.shape[1], room.data_ptr())
    return Sampled(*found.likeliest())


Drawn = Callable[[torch.Tensor, list[Row]], Sampled]
EITHER = pytest.mark.parametrize("drawn", [by_torch, compiled])


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


@EITHER
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
def test_draws_follow_the_distribution_of_transformers(drawn: Drawn, sampling: SamplingParams) -> None:
    logits = logits_of(3)
    history = [1, 2, 3, 3, 40]
    draws = 20_000
    rows = [Row(sampling, position, history) for position in range(draws)]
    counts = torch.bincount(
        torch.tensor(drawn(logits.expand(draws, -1), rows).token_ids), minlength=VOCABULARY
    )
    expected = reference(logits, sampling, history) * draws
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = (((counts - expected) ** 2)[possible] / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    # 6 standard deviations of the chi-squared distribution. Seeds are fixed, so the result never changes.
    assert chi2 < freedom + 6 * math.sqrt(2 * max(freedom, 1))


@EITHER
def test_greedy_logprob_and_confidence_are_the_models_own(drawn: Drawn) -> None:
    logits = logits_of(4, rows=3)
    rows = [Row(SamplingParams(temperature=t, top_k=1), 0, []) for t in (0.0, 0.0, 0.3)]
    sampled = drawn(logits, rows)
    log_softmax = logits.log_softmax(-1)
    assert sampled.token_ids == logits.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(sampled.logprobs), log_softmax.amax(-1))
    torch.testing.assert_close(torch.tensor(sampled.confidences), log_softmax.amax(-1).exp())


@EITHER
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2048),
    st.integers(0, 30),
    st.floats(0.01, 5),
    st.floats(0.05, 1),
    st.integers(0, 60),
)
def test_a_draw_depends_on_its_row_alone(
    drawn: Drawn, seed: int, position: int, place: int, temperature: float, top_p: float, top_k: int
) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    logits = logits_of(5, rows=31)
    others = [Row(SamplingParams(temperature=0.1 * i, top_k=i, seed=i), i, []) for i in range(31)]
    batch = [*others]
    batch[place] = Row(sampling, position, [])
    together = drawn(logits, batch)
    alone = drawn(logits[place : place + 1], [Row(sampling, position, [])])
    assert together.token_ids[place] == alone.token_ids[0]


@EITHER
def test_a_wide_nucleus_in_a_large_vocabulary_is_found(drawn: Drawn) -> None:
    logits = 0.01 * logits_of(6, vocabulary=5000)
    sampling = SamplingParams(temperature=1.0, top_p=0.9)
    rows = [Row(sampling, position, []) for position in range(2000)]
    tokens = drawn(logits.expand(2000, -1), rows).token_ids
    allowed = reference(logits, sampling, [0]) > 0
    assert allowed[tokens].all()
    assert 4000 < int(allowed.sum()) < 5000


@EITHER
def test_temperatures_near_zero_are_greedy_and_finite(drawn: Drawn) -> None:
    logits = logits_of(7)
    rows = [Row(SamplingParams(temperature=1e-30), 0, [])]
    assert drawn(logits, rows).token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocabulary", [3, 264, 5003])
@pytest.mark.parametrize("scale", [0.01, 1, 5])
def test_compiled_steps_draw_what_torch_does(vocabulary: int, scale: float) -> None:
    """Except where two tokens are nearly equally likely, because sums are rounded differently."""
    logits = scale * logits_of(8, 400, vocabulary)
    rows = [
        Row(
            SamplingParams(
                temperature=(0.0, 0.3, 1.0, 4.0)[i % 4],
                top_k=(0, 1, 40, vocabulary + 1)[i // 4 % 4],
                top_p=(1.0, 0.01, 0.9)[i // 16 % 3],
                repetition_penalty=(1.0, 1.7, 0.6)[i // 48 % 3],
                seed=2**64 - 1 - i,
            ),
            3 * i,
            [token % vocabulary for token in (i, i // 2, i, 7 * i)],
        )
        for i in range(400)
    ]
    expected, got = by_torch(logits, rows), compiled(logits, rows)
    same = [i for i in range(400) if expected.token_ids[i] == got.token_ids[i]]
    assert len(same) >= 396
    assert [expected.logprobs[i] for i in same] == [got.logprobs[i] for i in same]
    assert expected.confidences == got.confidences


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_no_number_draws_nothing(value: float) -> None:
    """A row with NaN or infinity keeps the token that the readout found most likely."""
    logits = torch.full((1, 40), value)
    drawn = compiled(logits, [Row(SamplingParams(temperature=1.0, top_p=0.9), 0, [])])
    assert drawn.token_ids == read(logits).best.tolist()


@given(st.integers(0, 2**64 - 1), st.integers(0, 100_000))
def test_uniform_is_in_range_and_repeatable(seed: int, position: int) -> None:
    assert 0 <= uniform(np.uint64(seed), position) < 1
    assert uniform(np.uint64(seed), position) == uniform(np.uint64(seed), position)


def test_uniform_is_uniform_along_seeds_and_positions() -> None:
    for values in (
        [uniform(np.uint64(s), 7) for s in range(20_000)],
        [uniform(np.uint64(7), p) for p in range(20_000)],
    ):
        counts = torch.histc(torch.tensor(values), bins=20, min=0, max=1)
        chi2 = float(((counts - 1000) ** 2 / 1000).sum())
        assert chi2 < 19 + 6 * math.sqrt(2 * 19)
