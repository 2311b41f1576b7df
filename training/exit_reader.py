"""Reads every exit of an early-exit model at once, with `transformers` as the independent reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from helios.architectures.registry import architecture_of, read_config
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


class ExitReader:
    """A frozen model of any architecture that Helios knows, and its exit heads.

    hidden_size: width of the layers' outputs. head: the LM head as [vocab, embed].
    """

    def __init__(
        self, directory: Path, exit_layers: Sequence[int], kind: ExitHeadKind, exits: Path | None = None
    ) -> None:
        """Load a local checkpoint in fp32, and the exit heads of the file `exits`, if given."""
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        config = read_config(directory)
        names = architecture_of(config).names
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        )
        self.model: Any = model.requires_grad_(False)
        self.exit_layers = tuple(exit_layers)
        self.hidden_size = config.hidden_size
        self._decoder: Any = model.get_submodule(names.prefixes[0].removesuffix("."))
        self._layers: Any = self._decoder.get_submodule(names.attn_norm.partition(".{}")[0])
        self.final_norm: nn.Module | None = getattr(self._decoder, names.final_norm)
        self._project_out: nn.Module | None = getattr(self._decoder, names.project_out or "", None)
        self.heads = ExitHeads(kind, self.exit_layers[:-1], config, self.final_norm)
        self.head: Tensor = self.model.lm_head.weight
        if exits is not None:
            self.heads.load(exits)

    @classmethod
    def open(cls, directory: Path, exit_layers: Sequence[int], kind: ExitHeadKind) -> ExitReader:
        """Load a checkpoint directory with its exit heads."""
        return cls(directory, exit_layers, kind, None if kind == "shared" else directory / EXITS_FILE)

    @torch.no_grad()
    def states(self, ids: Tensor) -> dict[int, Tensor]:
        """The outputs of the exit layers, the last one included, for ids [batch, length].

        Each is [batch, length, hidden]. The last one is before the final norm.
        """
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self._layers[layer - 1].register_forward_hook(keep(layer)) for layer in self.exit_layers]
        try:
            self._decoder(ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def read(self, layer: int, state: Tensor) -> Tensor:
        """What the exit of `layer` makes of the layer's output, before `project_out`. Both [..., hidden]."""
        if layer != self.exit_layers[-1]:
            return self.heads(layer, state)  # type: ignore[no-any-return]
        return state if self.final_norm is None else self.final_norm(state)

    def head_input(self, read: Tensor) -> Tensor:
        """What `read` gives, as the LM head takes it: [..., embed]."""
        return read if self._project_out is None else self._project_out(read)

    def logits(self, layer: int, state: Tensor) -> Tensor:
        """Logits [..., vocab] of the exit of `layer`, read from the layer's output [..., hidden]."""
        return self.head_input(self.read(layer, state)) @ self.head.T

    @torch.no_grad()
    def facts(self, pieces: Iterable[tuple[Tensor, int]]) -> dict[int, ExitFacts]:
        """The facts of each exit layer about texts: each its ids [length + 1], and the index of the first id
        that is a target.
        """
        parts: dict[int, list[ExitFacts]] = {layer: [] for layer in self.exit_layers}
        for ids, first in pieces:
            states, targets = self.states(ids[None, :-1]), ids[first:]
            for chunk in _chunks(len(targets)):
                for layer, state in states.items():
                    parts[layer].append(
                        ExitFacts.of(self.logits(layer, state[0, first - 1 :][chunk]), targets[chunk])
                    )
        return {layer: ExitFacts.join(found) for layer, found in parts.items()}


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, _ROWS):
        yield slice(start, min(start + _ROWS, length))
