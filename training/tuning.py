"""Tunes exit heads on the kept states of a frozen model.

The loss of an exit is `exit_weight` x cross-entropy + `distill_weight` x KL(last layer || exit). Only the
heads are tuned, so gradients end at the LM head's input; they are written by hand, which on a CPU is a third
faster than autograd over logits.
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
        for layer, gram in grams.items():
            normed = reader.heads.normed(layer, found[layer])  # [rows, hidden]
            gram += normed.T @ normed
            errors[layer] += normed.T @ (last - normed)
    for layer, gram in grams.items():
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        change = torch.linalg.solve(gram, errors[layer])  # [hidden in, hidden out]
        reader.heads.linears[str(layer)].add_(change.T)
