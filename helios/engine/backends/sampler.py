"""Chooses the next token of every row of a batch, with torch.

Compiled steps choose tokens themselves, in the same way (`kernels/sampling.py`); all other steps use this
module. A row's draw depends only on its logits and on (seed, position), not on the batch. It does not depend
on history either, except through the repetition penalty. So a resumed stream continues as it would have
without the interruption.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple, Self

import numpy as np
import torch

from helios.engine.backends.readout import Readout
from helios.engine.kernels.sampling import uniform
from helios.engine.scheduling.sequence import Sequence
from helios.sampling import SamplingParams

# The nucleus is first searched among this many top tokens; only if it is larger is the vocabulary sorted.
_NUCLEUS_CANDIDATES = 1024


class Row(NamedTuple):
    """Everything that decides one row's token: its parameters, its next position, the ids before it."""

    sampling: SamplingParams
    position: int
    token_ids: Seq[int]

    @classmethod
    def of(cls, sequence: Sequence) -> Self:
        """A row for a sequence's next token."""
        return cls(sequence.sampling, len(sequence.token_ids), sequence.token_ids)


class Sampled(NamedTuple):
    """Per row: token id, natural log-probability, confidence (probability of the most likely token)."""

    token_ids: list[int]
    logprobs: list[float]
    confidences: list[float]


def sample(found: Readout, rows: Mapping[int, Row]) -> Sampled:
    """Chooses a token for each row of a readout: as `rows` says, or else the most likely one."""
    if not rows:
        return Sampled(*found.likeliest())
    index = torch.tensor(list(rows), device=found.best.device)
    logits = found.logits[index]
    chosen = _choose(logits, found.best[index], list(rows.values()))
    chances = logits.gather(1, chosen[:, None])[:, 0] - found.normalizers[index]
    # Works on copies, so that the readout does not change.
    summaries = found.summaries.clone()
    summaries[index, 2] = chances
    return Sampled(*Readout(found.logits, found.best.index_copy(0, index, chosen), summaries).likeliest())


def _choose(logits: torch.Tensor, best: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Returns token ids [rows] for logits [rows, vocabulary]. best: the most likely tokens."""
    scores = _penalized(logits, rows)
    chosen = best if scores is logits else scores.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen = chosen.index_copy(0, index, _draw(scores[index], [rows[i] for i in drawn]))
    return chosen


def _penalized(logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Logits after the repetition penalty (Keskar et al. 2019)."""
    penalized = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1]
    if not penalized:
        return logits
    logits = logits.clone()
    for i in penalized:
        seen = torch.tensor(sorted(set(rows[i].token_ids)), device=logits.device)
        values = logits[i, seen]
        penalty = rows[i].sampling.repetition_penalty
        logits[i, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def _draw(scores: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Draws from scores [rows, vocabulary] by inverting the cumulative distribution in id order.

    Id order is stable: in order of likelihood two tokens of nearly equal score could swap.
    """
    device = scores.device
    temperature = torch.tensor([row.sampling.temperature for row in rows], device=device)
    # The maximum is subtracted first, so that a tiny temperature cannot overflow.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature[:, None]
    scores = _limited(scores, rows)
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    numbers = [uniform(np.uint64(row.sampling.seed), row.position) for row in rows]
    target = torch.tensor(numbers, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    # The first id whose cumulative probability exceeds the target. Its own probability is above 0.
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return drawn.clamp_(max=scores.shape[-1] - 1)


def _limited(scores: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Sets scores outside a row's top-k, then outside its nucleus (Holtzman et al. 2020), to -inf."""
    vocabulary = scores.shape[-1]
    top_k = [min(row.sampling.top_k or vocabulary, vocabulary) for row in rows]
    largest = max((k for k in top_k if k < vocabulary), default=0)
    if largest:
        values = scores.topk(largest, dim=-1).values
        kth = torch.tensor([min(k, largest) - 1 for k in top_k], device=scores.device)
        threshold = values.gather(1, kth[:, None])
        unlimited = torch.tensor([k == vocabulary for k in top_k], device=scores.device)
        threshold[unlimited] = float("-inf")
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    if any(row.sampling.top_p < 1 for row in rows):
        top_p = torch.tensor([row.sampling.top_p for row in rows], device=scores.device)[:, None]
        probabilities = scores.softmax(dim=-1)
        ordered = probabilities.topk(min(_NUCLEUS_CANDIDATES, vocabulary), dim=-1).values
        if bool(((ordered.sum(dim=-1, keepdim=True) < top_p) & (top_p < 1)).any()):
            ordered = probabilities.sort(dim=-1, descending=True).values
        # A token belongs to the nucleus if the tokens before it have not reached top_p.
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        threshold = ordered.masked_fill(outside, float("inf")).amin(dim=-1, keepdim=True)
        scores = scores.masked_fill((probabilities < threshold) & (top_p < 1), float("-inf"))
    return scores
