"""What a checkpoint's exits are worth: `python -m training.evaluate MODEL_DIR`.

Reads every exit over held-out text of every domain, calibrates the thresholds on every other window of the
model's own domains and takes all figures from the remaining windows. Writes helios.json and the card,
README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from helios.catalog import EarlyExitFacts, read_model
from helios.engine.tokenizer import load_tokenizer
from helios.errors import HeliosError, SettingsError
from helios.facts_file import write_facts
from training.calibration import calibrate_thresholds, default_depth, perplexity
from training.card import write_card
from training.corpora import DEFAULT_DIRECTORY, DOMAINS
from training.exit_reader import ExitFacts, ExitReader
from training.stream import held_out_windows, load_tokens

CONFIDENT, UNSURE = 0.8, 0.5
_PROMPTS = {
    "kjv": "And the LORD said unto Moses,",
    "handbook": "A firewall is",
    "wordnet": "river: ",
    "python": "The following example shows how to",
    "man": "NAME\n",
    "perl": "In Perl, a hash is",
}


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
    facts: Mapping[int, ExitFacts], thresholds: Mapping[int, float], target_bytes: int
) -> dict[int, ExitFigures]:
    """Figures of every exit; `target_bytes` is the length of the text that `facts` describe."""
    last = facts[max(facts)]
    figures = {}
    for layer, found in facts.items():
        agrees = found.top == last.top
        above = found.confidence >= thresholds[layer]
        figures[layer] = ExitFigures(
            perplexity=round(perplexity(found), 3),
            bits_per_byte=round(-found.log_probability.sum().item() / math.log(2) / target_bytes, 4),
            agreement=_share(agrees) or 0.0,
            confident=_share(found.confidence >= CONFIDENT) or 0.0,
            above_threshold=_share(above) or 0.0,
            agreement_above_threshold=_share(agrees[above]),
            agreement_unsure=_share(agrees[found.confidence < UNSURE]),
            agreement_below_threshold=_share(agrees[~above]),
        )
    return figures


def _share(chosen: Tensor) -> float | None:
    return round(chosen.double().mean().item(), 4) if len(chosen) else None


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Length in bytes of every token's text, 0 for special tokens. [vocab]"""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    sizes = [0] * tokenizer.get_vocab_size()
    for piece, index in tokenizer.get_vocab().items():
        if index not in special:
            sizes[index] = len(piece)  # byte-level BPE writes one character per byte
    return torch.tensor(sizes)


def sample(
    reader: ExitReader, tokenizer: Tokenizer, prompt: str, length: int, temperature: float, seed: int
) -> str:
    """`prompt` and its continuation by the full model; temperature 0 is greedy."""
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 0.95}
    model: Any = reader.model  # transformers types its mixin with `generate` for other classes
    out = model.generate(ids, max_new_tokens=length, pad_token_id=1, **sampling)
    return str(tokenizer.decode(out[0].tolist()))


@dataclass(frozen=True)
class Evaluation:
    """All figures of one model."""

    figures: dict[str, dict[int, ExitFigures]]  # domain -> exit layer
    own: dict[int, ExitFigures]  # over all tokens of the model's own domains
    thresholds: dict[int, float]
    default_depth: int
    samples: list[dict[str, Any]]


def evaluate(
    directory: Path, corpora: Path, domains: Sequence[str], own: Sequence[str], limit: int | None = None
) -> Evaluation:
    """Evaluate the checkpoint in `directory`; thresholds come from the domains `own`.

    `limit`: at most this many windows of a domain.
    """
    entry = read_model(directory)
    reader = ExitReader.open(directory, entry.exit_layers, entry.facts.exit_head)
    tokenizer = load_tokenizer(directory, entry.facts).tokenizer
    context = entry.context_tokens
    sizes = token_bytes(tokenizer)
    facts: dict[str, dict[int, ExitFacts]] = {}
    target_bytes: dict[str, int] = {}
    calibrating: list[dict[int, ExitFacts]] = []
    for domain in domains:
        held = load_tokens(corpora, tokenizer, domain, "held")
        windows = torch.from_numpy(held_out_windows(held, context, limit))
        if domain in own:
            calibrating.append(reader.facts(windows[0::2]))
        facts[domain] = reader.facts(windows[1::2])
        target_bytes[domain] = int(sizes[windows[1::2, 1:]].sum())
    thresholds = calibrate_thresholds(_joined(calibrating))
    own_facts = _joined([facts[name] for name in own])
    samples = [
        {"prompt": _PROMPTS[domain], "temperature": temperature, "text": text}
        for domain in own
        for temperature in (0.0, 0.8)
        if (text := sample(reader, tokenizer, _PROMPTS[domain], 120, temperature, seed=1))
    ]
    return Evaluation(
        own=exit_figures(own_facts, thresholds, sum(target_bytes[name] for name in own)),
        figures={name: exit_figures(found, thresholds, target_bytes[name]) for name, found in facts.items()},
        thresholds=thresholds,
        default_depth=default_depth(own_facts),
        samples=samples,
    )


def write_results(directory: Path, evaluation: Evaluation) -> EarlyExitFacts:
    """Write the evaluation into helios.json. Returns the new facts."""
    facts = read_model(directory).facts
    training = {
        "own_evaluation": _as_json(evaluation.own),
        "evaluation": {domain: _as_json(found) for domain, found in evaluation.figures.items()},
        "samples": evaluation.samples,
    }
    facts = replace(
        facts,
        thresholds=evaluation.thresholds,
        default_depth=evaluation.default_depth,
        training={**facts.training, **training},
    )
    write_facts(directory, facts)
    return facts


def _as_json(figures: Mapping[int, ExitFigures]) -> dict[str, dict[str, float | None]]:
    return {str(layer): asdict(found) for layer, found in figures.items()}


def _joined(parts: Sequence[Mapping[int, ExitFacts]]) -> dict[int, ExitFacts]:
    return {layer: ExitFacts.join([part[layer] for part in parts]) for layer in parts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("model", type=Path, help="directory with helios.json")
    parser.add_argument("--corpora", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--own", nargs="+", help="domains to calibrate on; default: those of its training")
    parser.add_argument("--limit", type=int, help="at most this many windows of a domain")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    own = arguments.own or read_model(arguments.model).facts.training.get("own_domains")
    names = [domain.name for domain in DOMAINS]
    if not own or set(own) - set(names):
        raise SettingsError(f"say with --own which of {', '.join(names)} the model is for")
    evaluation = evaluate(arguments.model, arguments.corpora, names, own, arguments.limit)
    facts = write_results(arguments.model, evaluation)
    licences = json.loads((arguments.corpora / "licences.json").read_text())
    card = write_card(arguments.model, facts, licences)
    print(card.read_text())


if __name__ == "__main__":
    try:
        main()
    except HeliosError as error:
        sys.exit(f"error: {error}")
