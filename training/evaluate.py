"""What a checkpoint's exits are worth: `python -m training.evaluate MODEL_DIR`.

Reads every exit over held-out text of every domain, calibrates the thresholds on every other window of the
model's own domains and takes all figures from the remaining windows. Writes helios.json and the card,
README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from helios.catalog import EarlyExitFacts, read_model
from helios.engine.tokenizer import load_tokenizer
from helios.errors import HeliosError, SettingsError
from helios.facts_file import write_facts
from training.calibration import calibrate_thresholds, default_depth
from training.card import write_card
from training.corpora import DEFAULT_DIRECTORY, DOMAINS
from training.exit_figures import ExitFigures, exit_figures, figures_as_json, joined, target_bytes
from training.exit_reader import ExitFacts, ExitReader
from training.stream import held_out_windows, load_tokens

_PROMPTS = {
    "kjv": "And the LORD said unto Moses,",
    "handbook": "A firewall is",
    "wordnet": "river: ",
    "python": "The following example shows how to",
    "man": "NAME\n",
    "perl": "In Perl, a hash is",
}


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
    facts: dict[str, dict[int, ExitFacts]] = {}
    lengths: dict[str, int] = {}
    calibrating: list[dict[int, ExitFacts]] = []
    for domain in domains:
        held = load_tokens(corpora, tokenizer, domain, "held")
        windows = torch.from_numpy(held_out_windows(held, context, limit))
        if domain in own:
            calibrating.append(reader.facts((window, 1) for window in windows[0::2]))
        facts[domain] = reader.facts((window, 1) for window in windows[1::2])
        lengths[domain] = target_bytes(tokenizer, list(windows[1::2]))
    thresholds = calibrate_thresholds(joined(calibrating))
    own_facts = joined([facts[name] for name in own])
    samples = [
        {"prompt": _PROMPTS[domain], "temperature": temperature, "text": text}
        for domain in own
        for temperature in (0.0, 0.8)
        if (text := sample(reader, tokenizer, _PROMPTS[domain], 120, temperature, seed=1))
    ]
    return Evaluation(
        own=exit_figures(own_facts, thresholds, sum(lengths[name] for name in own)),
        figures={name: exit_figures(found, thresholds, lengths[name]) for name, found in facts.items()},
        thresholds=thresholds,
        default_depth=default_depth(own_facts),
        samples=samples,
    )


def write_results(directory: Path, evaluation: Evaluation) -> EarlyExitFacts:
    """Write the evaluation into helios.json. Returns the new facts."""
    facts = read_model(directory).facts
    training = {
        "own_evaluation": figures_as_json(evaluation.own),
        "evaluation": {domain: figures_as_json(found) for domain, found in evaluation.figures.items()},
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
