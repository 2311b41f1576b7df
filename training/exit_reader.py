"""Reads every exit of an early-exit OPT at once, with `transformers` as the independent reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import OPTForCausalLM
from transformers.utils import logging

from helios.catalog import EXITS_FILE, ExitHeadKind
from training.exit_heads import ExitHeads

_ROWS = 512  # positions whose logits are in memory at once


@dataclass
class ExitFacts:
    """The predictions of one exit for each token of a text. Every tensor is [tokens]."""

    log_probability: Tensor  # of the token that really follows, in nats
    confidence: Tensor  # probability of the exit's most likely token
    top: Tensor  # the exit's most likely token

    @staticmethod
    def of(logits: Tensor, targets: Tensor) -> ExitFacts:
        """Computes the facts from logits [tokens, vocab] and targets [tokens]."""
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        confidence, top = log_probabilities.max(dim=-1)
        return ExitFacts(log_probabilities.gather(1, targets[:, None])[:, 0], confidence.exp(), top)

    @staticmethod
    def join(parts: Sequence[ExitFacts]) -> ExitFacts:
        return ExitFacts(
            torch.cat([part.log_probability for part in parts]),
            torch.cat([part.confidence for part in parts]),
            torch.cat([part.top for part in parts]),
        )


def load_opt(directory: Path) -> OPTForCausalLM:
    """A local OPT checkpoint in fp32, in evaluation mode."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return OPTForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


class ExitReader:
    """A frozen OPT of any variant and its exit heads."""

    def __init__(self, model: OPTForCausalLM, heads: ExitHeads, exit_layers: Sequence[int]) -> None:
        self.model = model.requires_grad_(False)
        self.heads = heads
        self.exit_layers = tuple(exit_layers)

    @classmethod
    def open(cls, directory: Path, exit_layers: Sequence[int], kind: ExitHeadKind) -> ExitReader:
        """Load a checkpoint directory in fp32."""
        model = load_opt(directory)
        heads = ExitHeads(
            kind, exit_layers[:-1], model.config.hidden_size, model.model.decoder.final_layer_norm
        )
        if kind != "shared":
            heads.load(directory / EXITS_FILE)
        return cls(model, heads, exit_layers)

    @torch.no_grad()
    def states(self, ids: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """The states that the exits read for ids [batch, length].

        Returns the outputs of the exit layers before the last, [batch, length, hidden], and the input of the
        LM head from the last layer, [batch, length, word_embed_proj_dim].
        """
        done = self.model.model.decoder(ids, output_hidden_states=True)
        return {layer: done.hidden_states[layer] for layer in self.exit_layers[:-1]}, done.last_hidden_state

    def early_logits(self, layer: int, state: Tensor) -> Tensor:
        """Logits [..., vocab] read from the output of `layer`, [..., hidden]."""
        read = self.heads(layer, state)
        project = self.model.model.decoder.project_out
        return self.model.lm_head(read if project is None else project(read))  # type: ignore[no-any-return]

    def last_logits(self, last: Tensor) -> Tensor:
        """Logits [..., vocab] of the full model."""
        return self.model.lm_head(last)  # type: ignore[no-any-return]

    @torch.no_grad()
    def facts(self, windows: Tensor) -> dict[int, ExitFacts]:
        """For windows [rows, length + 1]: the facts of each exit layer about all rows x length targets."""
        parts: dict[int, list[ExitFacts]] = {layer: [] for layer in self.exit_layers}
        for row in windows:
            states, last = self.states(row[None, :-1])
            for chunk in _chunks(len(row) - 1):
                targets = row[1:][chunk]
                for layer, state in states.items():
                    parts[layer].append(ExitFacts.of(self.early_logits(layer, state[0, chunk]), targets))
                parts[self.exit_layers[-1]].append(ExitFacts.of(self.last_logits(last[0, chunk]), targets))
        return {layer: ExitFacts.join(found) for layer, found in parts.items()}


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, _ROWS):
        yield slice(start, min(start + _ROWS, length))
