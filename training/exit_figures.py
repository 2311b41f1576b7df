"""What an exit is worth on held-out text, in figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from tokenizers import Tokenizer
from torch import Tensor

from training.calibration import perplexity
from training.exit_reader import ExitFacts

CONFIDENT, UNSURE = 0.8, 0.5


@dataclass(frozen=True)
class ExitFigures:
    """One exit on the held-out text of one domain. Shares are of tokens. None: there are no such tokens."""

    perplexity: float
    bits_per_byte: float
    agreement: float  # share of tokens whose most likely token is the same as the last layer's
    confident: float  # share of tokens with confidence >= 0.8
    above_threshold: float  # share of tokens with confidence >= the exit's calibrated threshold
    agreement_above_threshold: float | None
    agreement_unsure: float | None  # the same among tokens with confidence < 0.5
    agreement_below_threshold: float | None


def exit_figures(
    facts: Mapping[int, ExitFacts], thresholds: Mapping[int, float], text_bytes: int
) -> dict[int, ExitFigures]:
    """Figures of every exit; `text_bytes` is the length of the text that `facts` describe."""
    last = facts[max(facts)]
    figures = {}
    for layer, found in facts.items():
        agrees = found.top == last.top
        above = found.confidence >= thresholds[layer]
        figures[layer] = ExitFigures(
            perplexity=round(perplexity(found), 3),
            bits_per_byte=round(-found.log_probability.sum().item() / math.log(2) / text_bytes, 4),
            agreement=_share(agrees) or 0.0,
            confident=_share(found.confidence >= CONFIDENT) or 0.0,
            above_threshold=_share(above) or 0.0,
            agreement_above_threshold=_share(agrees[above]),
            agreement_unsure=_share(agrees[found.confidence < UNSURE]),
            agreement_below_threshold=_share(agrees[~above]),
        )
    return figures


def figures_as_json(figures: Mapping[int, ExitFigures]) -> dict[str, dict[str, float | None]]:
    """The figures as helios.json has them."""
    return {str(layer): asdict(found) for layer, found in figures.items()}


def joined(parts: Sequence[Mapping[int, ExitFacts]]) -> dict[int, ExitFacts]:
    """The facts of several texts together."""
    return {layer: ExitFacts.join([part[layer] for part in parts]) for layer in parts[0]}


def target_bytes(tokenizer: Tokenizer, pieces: Sequence[Tensor]) -> int:
    """Bytes of the text that pieces of ids predict: all but their first token, without special tokens."""
    return sum(len(tokenizer.decode(piece[1:].tolist()).encode()) for piece in pieces)


def _share(chosen: Tensor) -> float | None:
    return round(chosen.double().mean().item(), 4) if len(chosen) else None
