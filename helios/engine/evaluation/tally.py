"""Counts on one text, for every exit: confidence, agreement with the last layer, and nats."""

import itertools
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.evaluation.pace import Pace
from helios.engine.scheduling.batch import Batch, build_batch
from helios.engine.scheduling.sequence import Sequence
from helios.history import CONFIDENCE_BINS

# Positions whose logits are held at once, so that [rows, vocabulary] stays small beside the weights.
_ROWS = 64


def _bins() -> torch.Tensor:
    return torch.zeros(CONFIDENCE_BINS, dtype=torch.int64)


@dataclass(slots=True)
class ExitTally:
    """One exit's histograms, [CONFIDENCE_BINS] each, and its cross-entropy in nats."""

    counts: torch.Tensor = field(default_factory=_bins)
    agreements: torch.Tensor = field(default_factory=_bins)
    # Nats of the prompts' own next tokens. Generated tokens do not count.
    nats: float = 0.0

    def add(self, logits: torch.Tensor, last_top: torch.Tensor, targets: torch.Tensor | None) -> None:
        """Counts rows: logits [rows, vocabulary], last_top and targets [rows]."""
        logits = logits.float()
        normalizer = logits.logsumexp(dim=-1)
        best, top = logits.max(dim=-1)
        confidence = (best - normalizer).exp()
        bins = (confidence * CONFIDENCE_BINS).long().clamp_(max=CONFIDENCE_BINS - 1)
        self.counts += torch.bincount(bins, minlength=CONFIDENCE_BINS).cpu()
        agreeing = bins[top == last_top]
        self.agreements += torch.bincount(agreeing, minlength=CONFIDENCE_BINS).cpu()
        if targets is not None and len(targets):
            # The last position of a prompt has no next token.
            known = logits[: len(targets)].gather(1, targets[:, None])[:, 0]
            self.nats += float((normalizer[: len(targets)] - known).double().sum())


@torch.inference_mode()
def tally_prompt(
    model: Model,
    cache: KVCache,
    sequence: Sequence,
    block_tokens: int,
    tallies: Mapping[int, ExitTally],
    pace: Pace,
) -> None:
    """Counts a prompt's positions at every exit. Appends the last layer's next token to the sequence.

    sequence: has its blocks, nothing computed. tallies: by exit layer, including the last one.
    """
    ids = torch.tensor(sequence.token_ids, device=model.device)
    batch, _ = build_batch([(sequence, sequence.pending)], block_tokens, model.device)
    states = _states(model, cache, batch, tallies)
    for start in range(0, len(ids), _ROWS):
        rows = slice(start, start + _ROWS)
        targets = ids[start + 1 : start + 1 + _ROWS]
        top = _tally(model, {layer: state[rows] for layer, state in states.items()}, targets, tallies)
        pace.rest()
    sequence.computed = len(ids)
    sequence.token_ids.append(int(top[-1]))


@torch.inference_mode()
def tally_continuations(
    model: Model,
    cache: KVCache,
    sequences: Seq[Sequence],
    steps: int,
    block_tokens: int,
    tallies: Mapping[int, ExitTally],
    pace: Pace,
) -> None:
    """Decodes sequences greedily by the last layer, in one batch, and counts every exit's output.

    sequences: each has one token to compute, and blocks for `steps` more tokens. A sequence that ends its
    text leaves the batch.
    """
    for _ in range(steps):
        eos = model.config.eos_token_ids
        sequences = [sequence for sequence in sequences if sequence.token_ids[-1] not in eos]
        if not sequences:
            return
        batch, _ = build_batch([(sequence, 1) for sequence in sequences], block_tokens, model.device)
        top = _tally(model, _states(model, cache, batch, tallies), None, tallies)
        for sequence, token in zip(sequences, top.tolist(), strict=True):
            sequence.computed += 1
            sequence.token_ids.append(token)
        pace.rest()


def _states(model: Model, cache: KVCache, batch: Batch, exits: Iterable[int]) -> dict[int, torch.Tensor]:
    """Hidden states after each exit layer, [T, hidden]."""
    hidden = model.embed(batch.token_ids, batch.positions)
    states = {}
    for first, last in itertools.pairwise((0, *sorted(exits))):
        states[last] = hidden = model.layers(first, last, hidden, batch, cache)
    return states


def _tally(
    model: Model,
    states: Mapping[int, torch.Tensor],
    targets: torch.Tensor | None,
    tallies: Mapping[int, ExitTally],
) -> torch.Tensor:
    """Adds the rows of `states` to the tallies. Returns the last layer's top tokens, [rows]."""
    last = model.read_out(states[model.depth], model.depth)
    top = last.argmax(dim=-1)
    for exit_layer, state in states.items():
        logits = last if exit_layer == model.depth else model.read_out(state, exit_layer)
        tallies[exit_layer].add(logits, top, targets)
    return top
