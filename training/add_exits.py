"""Exits for a checkpoint that has none, of any architecture that Helios knows.

EE-Tuning (Pan et al. 2024, arXiv 2402.00518): the model stays frozen and only the exit heads are trained,
each starting from how the last layer is read. The frozen model runs once over the text; its states are kept
on disk while the heads are tuned (`tuning.py`). An interrupted run goes on from its state.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from helios.catalog import EXITS_FILE, FACTS_FILE, TOKENIZER_FILE, EarlyExitFacts, ExitHeadKind, read_model
from helios.engine.tokenizer import load_tokenizer
from helios.errors import InvalidRequestError
from helios.facts_file import write_facts
from helios.staging import check_free, staged
from helios.weights_digest import weights_digest
from training.calibration import calibrate_thresholds, default_depth
from training.card import write_exit_card
from training.exit_figures import exit_figures, figures_as_json, joined, target_bytes
from training.exit_reader import ExitFacts, ExitReader
from training.exit_states import ExitStates
from training.passages import Passage, Passages, pieces, read_passages
from training.tuning import Tuning, TuningOptions

STATE_ROOT = Path("~/.cache/helios/training").expanduser()
_HELD_TOKENS = 16_384  # most held-out tokens that are read, of all texts together


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    stage: `reading` (the model runs over the text; steps are tokens) or `tuning`. loss: the mean
    cross-entropy of all exits, nats per token; None while reading.
    """

    stage: str
    step: int
    steps: int
    loss: float | None
    seconds_left: float


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """Exits at every quarter of the model's depth."""
    return tuple(sorted({max(1, round(num_layers * part / 4)) for part in (1, 2, 3, 4)}))


def add_exits(
    source: Path,
    target: Path,
    *,
    exit_layers: Sequence[int] | None = None,
    head: ExitHeadKind = "linear",
    texts: Sequence[Path],
    options: TuningOptions | None = None,
    state: Path | None = None,
    exits_only: bool = False,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Write to `target` the checkpoint `source` with tuned exit heads and calibrated thresholds.

    exit_layers: ascending; the last layer is added when it is missing; default every quarter. texts: UTF-8
    files of the kinds of text that will be served; the last tenth of each calibrates the thresholds and is
    measured. state: the directory that keeps the run's state until the run ends. Weights are hard-linked
    where the file system allows it. exits_only: write only the exits, without the model they are for; the
    digest of its weights says which that is.

    Raises CheckpointError when `source` cannot be used or `target` exists, InvalidRequestError for bad
    arguments, UnavailableError when the disk is too small for the states.
    """
    options = options or TuningOptions()
    check_free(target, replace=force)
    entry = read_model(source)
    layers = _checked_layers(exit_layers or default_exit_layers(entry.num_layers), entry.num_layers)
    loaded = load_tokenizer(source, EarlyExitFacts((entry.num_layers,), "shared", entry.num_layers))
    length = min(options.length, entry.context_tokens)
    passages = read_passages(texts, length)
    reader = ExitReader(source, layers, head)
    directory = state or STATE_ROOT / f"add-exits-{target.name}"
    own = head != "shared"  # the shared head has nothing to tune
    training: dict[str, Any] = {"recipe": "the model's own final norm, not tuned"}
    if own:
        tokens = options.steps * options.tokens_per_step // options.passes
        chosen = _chosen_pieces(passages, loaded.tokenizer, length, tokens, options.seed)
        identity = {
            "source": str(source.resolve()),
            "texts": [str(path.resolve()) for path in texts],
            "exit_layers": list(layers),
            "tokens": sum(len(piece) - 1 for piece in chosen),
        }
        states = ExitStates(directory, reader, chosen, identity)
        report_reading = _reporter("reading", states.done, states.count, progress)
        states.collect(lambda tokens: report_reading(tokens, None))
        tuning = Tuning(reader, states, options, directory)
        tuning.resume(identity | {"head": head, "steps": options.steps})
        report = _reporter("tuning", tuning.step, options.steps, progress)
        tuning.run(lambda loss: report(tuning.step, loss))
        training = {
            "recipe": "heads tuned on the frozen model",
            "texts": [text.name for text in passages],
            "text_tokens": states.count,
            "steps": options.steps,
            "tokens_per_step": options.tokens_per_step,
            "exit_weight": options.exit_weight,
            "distill_weight": options.distill_weight,
        }
    with staged(target, replace=force) as staging:
        if own:
            reader.heads.save(staging / EXITS_FILE, torch.bfloat16)
            (staging / EXITS_FILE).chmod(0o644)  # safetensors makes it private
            reader.heads.load(staging / EXITS_FILE)  # what is measured is what is served
        measured = _measure(reader, passages, loaded.tokenizer, length)
        facts = EarlyExitFacts(
            exit_layers=layers,
            exit_head=head,
            default_depth=measured.default_depth,
            thresholds=measured.thresholds,
            tokenizer_id=loaded.tokenizer_id,
            training=training | measured.training,
            weights_digest=weights_digest(source) if exits_only else None,
        )
        if not exits_only:
            _link_checkpoint(source, staging)
            (staging / TOKENIZER_FILE).write_bytes(loaded.tokenizer_json)
        write_facts(staging, facts)
        write_exit_card(staging, facts, source.name)
    if own:
        states.delete()
        tuning.delete()
    return target


def _checked_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    ascending = tuple(sorted({*layers, num_layers}))
    if ascending[0] < 1 or ascending[-1] > num_layers:
        raise InvalidRequestError(f"exit layers {list(layers)} must lie within 1 to {num_layers}")
    if len(ascending) == 1:
        raise InvalidRequestError(f"name at least one exit layer before the last ({num_layers})")
    return ascending


def _chosen_pieces(
    texts: Sequence[Passages], tokenizer: Tokenizer, length: int, tokens: int, seed: int
) -> list[Tensor]:
    """Pieces with at least `tokens` tokens, or all: every text gives the same share, as far as it has it."""
    order = np.random.default_rng(seed)
    shuffled = [[text.tuning[place] for place in order.permutation(len(text.tuning))] for text in texts]
    chosen: list[Tensor] = []
    taken = [0] * len(texts)
    while any(shuffled) and sum(taken) < tokens:
        number = min((index for index, left in enumerate(shuffled) if left), key=taken.__getitem__)
        found = [piece.ids for piece in pieces(tokenizer, shuffled[number].pop(), length)]
        chosen += found
        taken[number] += sum(len(ids) - 1 for ids in found)
    return chosen


def _reporter(
    stage: str, first: int, steps: int, progress: Callable[[Progress], None] | None
) -> Callable[[int, float | None], None]:
    """Turns steps done into progress with an estimate of the time left."""
    started = time.monotonic()

    def report(step: int, loss: float | None) -> None:
        if progress is not None:
            rate = (time.monotonic() - started) / (step - first)
            progress(Progress(stage, step, steps, loss, rate * (steps - step)))

    return report


@dataclass(frozen=True)
class _Measured:
    default_depth: int
    thresholds: dict[int, float]
    training: dict[str, Any]


def _measure(reader: ExitReader, texts: Sequence[Passages], tokenizer: Tokenizer, length: int) -> _Measured:
    """Read the held-out passages: every other one calibrates the thresholds, the rest are the figures."""
    calibrating: list[dict[int, ExitFacts]] = []
    facts: list[dict[int, ExitFacts]] = []
    lengths: list[int] = []
    for text in texts:
        held = _evenly(text.held, _HELD_TOKENS // len(texts) // length)
        halves = [
            [piece for passage in held[half::2] for piece in pieces(tokenizer, passage, length)]
            for half in (0, 1)
        ]
        calibrating.append(reader.facts(halves[0]))
        facts.append(reader.facts(halves[1]))
        lengths.append(target_bytes(tokenizer, [ids[first - 1 :] for ids, first in halves[1]]))
    thresholds = calibrate_thresholds(joined(calibrating))
    together = joined(facts)
    return _Measured(
        default_depth=default_depth(together),
        thresholds=thresholds,
        training={
            "own_evaluation": figures_as_json(exit_figures(together, thresholds, sum(lengths))),
            "evaluation": {
                text.name: figures_as_json(exit_figures(found, thresholds, length))
                for text, found, length in zip(texts, facts, lengths, strict=True)
            },
        },
    )


def _evenly(passages: Sequence[Passage], wanted: int) -> list[Passage]:
    """So many passages, evenly spread, but at least two; or all."""
    if wanted >= len(passages):
        return list(passages)
    return [passages[place] for place in np.linspace(0, len(passages) - 1, max(2, wanted)).astype(int)]


def _link_checkpoint(source: Path, target: Path) -> None:
    """Link or copy the files of `source`, except its facts about exits and its card."""
    for path in source.iterdir():
        if path.is_file() and path.name not in (FACTS_FILE, EXITS_FILE, TOKENIZER_FILE, "README.md"):
            try:
                os.link(path.resolve(), target / path.name)
            except OSError:
                shutil.copyfile(path, target / path.name)
