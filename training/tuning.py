"""Tunes exit heads on the kept states of a frozen model.

The loss of an exit is `exit_weight` x cross-entropy + `distill_weight` x KL(last layer || exit). It is taken
over the tokens that the texts contain, because nearly all of its cost are logits and a text contains only a
part of a large vocabulary. Only the heads are tuned, so gradients end at the LM head's input; they are
written by hand, which on a CPU is a third faster than autograd over logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helios.errors import CheckpointError
from training.checkpoint import load_state, save_state
from training.exit_reader import ExitReader
from training.exit_states import ExitStates
from training.loss_log import LossLog

_ROWS = 256  # positions whose logits are in memory at once
_GRAM_ROWS = 4096  # positions whose products are summed at once
_RIDGE = 1e-2


@dataclass(frozen=True)
class TuningOptions:
    """How the heads are tuned."""

    steps: int = 500
    tokens_per_step: int = 2048
    passes: int = 1  # how often each token of the text is used
    length: int = 256  # tokens in a piece of text; at most the model's context
    lr: float = 1e-3
    exit_weight: float = 0.5  # weight of the cross-entropy
    distill_weight: float = 0.5  # weight of KL(last layer || exit)
    seed: int = 0
    save_minutes: float = 10.0


@torch.no_grad()
def start_heads(reader: ExitReader, states: ExitStates) -> None:
    """Initialise the heads: norms as the last layer is read, matrices by least squares.

    The matrix W of an exit minimises |W x - y|^2 + ridge |W - 1|^2, where x is the exit's normed state and y
    the last layer's (Belrose et al. 2023, arXiv 2303.08112, train such a map; this solves for it).
    """
    sample, _ = states.rows(slice(0, _GRAM_ROWS))
    for layer in reader.exit_layers[:-1]:
        reader.heads.start_norm(layer, sample[layer])
    if reader.heads.kind != "linear":
        return
    width = reader.hidden_size
    grams = {layer: torch.zeros(width, width, dtype=torch.float64) for layer in reader.exit_layers[:-1]}
    errors = {layer: torch.zeros(width, width, dtype=torch.float64) for layer in grams}
    for start in range(0, states.count, _GRAM_ROWS):
        found, _ = states.rows(slice(start, start + _GRAM_ROWS))
        last = reader.read(reader.exit_layers[-1], found[reader.exit_layers[-1]])
        for layer in grams:
            normed = reader.heads.normed(layer, found[layer])  # [rows, hidden]
            grams[layer] += normed.T @ normed
            errors[layer] += normed.T @ (last - normed)
    for layer, gram in grams.items():
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        change = torch.linalg.solve(gram, errors[layer])  # [hidden in, hidden out]
        reader.heads.linears[str(layer)].add_(change.T)


class Tuning:
    """A run in progress: the heads, their optimiser, and how many steps are done."""

    def __init__(
        self, reader: ExitReader, states: ExitStates, options: TuningOptions, directory: Path
    ) -> None:
        self._reader = reader
        self._states = states
        self._options = options
        self._path = directory / "state.pt"
        self._vocabulary = states.vocabulary()  # ascending ids
        self._head = reader.head[self._vocabulary]  # [vocabulary, embed]
        self._log = LossLog(directory / "log.jsonl")
        self._plot = directory / "loss.png"
        self._optimiser = torch.optim.AdamW(
            reader.heads.own_parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.step = 0
        self._identity: dict[str, Any] = {}

    def resume(self, identity: dict[str, Any]) -> None:
        """Go on from the saved state, or start. `identity` must be the same as in the saved run."""
        self._identity = identity
        if not self._path.exists():
            self._log.cut(0)
            start_heads(self._reader, self._states)
            return
        state = load_state(self._path)
        if state["identity"] != identity:
            raise CheckpointError(
                f"{self._path} is of another run ({state['identity']}); delete it, or choose another --state"
            )
        self._reader.heads.load_state_dict(state["heads"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        self._log.cut(self.step)

    def run(self, progress: Callable[[float], None]) -> None:
        """Take the steps that are left. progress: called after each with the mean loss of all exits."""
        options, saved = self._options, time.monotonic()
        while self.step < options.steps:
            last, exits = self._run_step()
            self._log.append({"step": self.step, "loss": last, "exit_loss": exits})
            progress(exits)
            if time.monotonic() - saved > 60 * options.save_minutes:
                self._save()
                saved = time.monotonic()
        self._save()
        self._log.plot(self._plot)

    def delete(self) -> None:
        """Delete the state of a finished run. The log and its plot stay."""
        self._path.unlink(missing_ok=True)

    def _save(self) -> None:
        state = {
            "identity": self._identity,
            "heads": self._reader.heads.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "step": self.step,
        }
        save_state(self._path, state)

    def _places(self) -> Tensor:
        """The positions of this step. Each pass over the states has an order of its own."""
        size, count = min(self._options.tokens_per_step, self._states.count), self._states.count
        per_pass = count // size
        number, place = divmod(self.step, per_pass)
        order = np.random.default_rng((self._options.seed, number)).permutation(count)
        return torch.from_numpy(order[place * size : (place + 1) * size])

    def _run_step(self) -> tuple[float, float]:
        """One step. Returns the cross-entropies of the last layer and of the exits, nats per token."""
        options = self._options
        self._optimiser.param_groups[0]["lr"] = options.lr * (1 - self.step / options.steps)
        places = self._places()
        sums = torch.zeros(2)
        for start in range(0, len(places), _ROWS):
            sums += self._add_gradients(places[start : start + _ROWS], len(places))
        self._optimiser.step()
        self._optimiser.zero_grad()
        self.step += 1
        last, exits = (sums / len(places)).tolist()
        return last, exits

    def _add_gradients(self, places: Tensor, count: int) -> Tensor:
        """Add the gradients of the loss at `places`, as a part of `count` positions.

        Returns the sums of the cross-entropies of the last layer, and of the exits on average. [2]
        """
        reader, options = self._reader, self._options
        *early, deepest = reader.exit_layers
        states, targets = self._states.rows(places)
        target = torch.searchsorted(self._vocabulary, targets)[:, None]
        head = self._head
        sums = torch.zeros(2)
        with torch.no_grad():
            last = reader.head_input(reader.read(deepest, states[deepest]))
            teacher = torch.log_softmax(last @ head.T, dim=-1)  # [rows, vocabulary]
            sums[0] = -teacher.gather(1, target).sum()
            teacher.exp_()
        for layer in early:
            read = reader.head_input(reader.heads(layer, states[layer]))  # [rows, embed]
            with torch.no_grad():
                student = torch.log_softmax(read @ head.T, dim=-1)
                sums[1] -= student.gather(1, target).sum() / len(early)
                student.exp_().mul_(options.exit_weight + options.distill_weight)
                student.sub_(teacher, alpha=options.distill_weight)
                student.scatter_add_(
                    1, target, torch.full_like(target, -options.exit_weight, dtype=torch.float32)
                )
                gradient = (student @ head).div_(count)
            read.backward(gradient)
        return sums
