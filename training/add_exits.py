"""Exits for an OPT checkpoint that has none: `python -m training.add_exits SOURCE TARGET --text FILE ...`.

EE-Tuning (Pan et al. 2024, arXiv 2402.00518): the model stays frozen and only the exit heads are trained,
each starting from how the last layer is read. Loss per exit: cross-entropy, and distillation of the frozen
last layer. Any OPT that transformers loads will do; an interrupted run goes on from its state.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios.catalog import EXITS_FILE, FACTS_FILE, TOKENIZER_FILE, EarlyExitFacts, ExitHeadKind, read_model
from helios.engine.tokenizer import load_tokenizer
from helios.errors import CheckpointError, HeliosError, InvalidRequestError
from helios.facts_file import write_facts
from helios.staging import check_free, staged
from training.calibration import calibrate_thresholds, default_depth, perplexity
from training.checkpoint import load_state, save_state
from training.exit_heads import ExitHeads
from training.exit_reader import ExitReader, load_opt
from training.loss_log import LossLog
from training.stream import WindowStream, encode_documents, held_out_windows

STATE_ROOT = Path("~/.cache/helios/training").expanduser()
_HELD_SHARE = 0.1  # share of the text, at its end, that calibrates the thresholds
_HELD_WINDOWS = 64
_LOSS_ROWS = 256  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Progress:
    """How far a run is. `loss` is the mean cross-entropy of all exits, nats per token."""

    step: int
    steps: int
    loss: float
    seconds_left: float


@dataclass(frozen=True)
class TuningOptions:
    """How the heads are tuned."""

    steps: int = 500
    tokens_per_step: int = 2048
    length: int = 256  # tokens in a window; at most the model's context
    lr: float = 1e-3
    exit_weight: float = 0.5  # weight of the cross-entropy
    distill_weight: float = 0.5  # weight of KL(last layer || exit)
    seed: int = 0
    save_minutes: float = 10.0


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
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Write to `target` the checkpoint `source` with tuned exit heads and calibrated thresholds.

    exit_layers: ascending; the last layer is added when it is missing; default every quarter. texts: UTF-8
    files of the kind of text that will be served; their last tenth calibrates the thresholds. state: the
    directory that keeps the run's state until the run ends. Weights are hard-linked where the file system
    allows it.

    Raises CheckpointError when `source` cannot be used or `target` exists, InvalidRequestError for bad
    arguments.
    """
    options = options or TuningOptions()
    check_free(target, replace=force)
    entry = read_model(source)
    layers = _checked_layers(exit_layers or default_exit_layers(entry.num_layers), entry.num_layers)
    loaded = load_tokenizer(source, EarlyExitFacts((entry.num_layers,), "shared", entry.num_layers))
    length = min(options.length, entry.context_tokens)
    ids = encode_documents(loaded.tokenizer, read_texts(texts))
    held_size = max(length + 1, int(len(ids) * _HELD_SHARE))
    if len(ids) < held_size + 2 * length + 1:
        raise InvalidRequestError(
            f"the texts have {len(ids)} tokens; tuning needs at least {3 * length + 2}, better 100,000"
        )
    model = load_opt(source)
    heads = ExitHeads(head, layers[:-1], model.config.hidden_size, model.model.decoder.final_layer_norm)
    reader = ExitReader(model, heads, layers)
    windows = WindowStream({"text": ids[:-held_size]}, {"text": 1.0}, options.seed, {})
    directory = state or STATE_ROOT / f"add-exits-{target.name}"
    tuning = _Tuning(reader, windows, options, length, directory)
    if head != "shared":  # the shared head has nothing to tune
        identity = {"source": str(source.resolve()), "exit_layers": list(layers), "head": head}
        tuning.resume(identity | {"text_tokens": len(ids)})
        tuning.run(progress)
    held = torch.from_numpy(held_out_windows(ids[-held_size:], length, _HELD_WINDOWS))
    facts = reader.facts(held)
    with staged(target, replace=force) as staging:
        _link_checkpoint(source, staging)
        (staging / TOKENIZER_FILE).write_bytes(loaded.tokenizer_json)
        if head != "shared":
            heads.save(staging / EXITS_FILE)
            shutil.copymode(staging / TOKENIZER_FILE, staging / EXITS_FILE)  # safetensors makes it private
        training = {
            "recipe": "heads tuned on the frozen model",
            "steps": options.steps,
            "tokens_per_step": options.tokens_per_step,
            "perplexity": {str(layer): round(perplexity(found), 3) for layer, found in facts.items()},
        }
        write_facts(
            staging,
            EarlyExitFacts(
                exit_layers=layers,
                exit_head=head,
                default_depth=default_depth(facts),
                thresholds=calibrate_thresholds(facts),
                tokenizer_id=loaded.tokenizer_id,
                training=training,
            ),
        )
    tuning.finish()
    return target


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Texts of UTF-8 files: one document per file, or per line of a `.jsonl` file (its field "text")."""
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            documents += (
                [json.loads(line)["text"] for line in text.splitlines()]
                if path.suffix == ".jsonl"
                else [text]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(f"{path} cannot be read as text ({error})") from error
    return documents


def _checked_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    ascending = tuple(sorted({*layers, num_layers}))
    if ascending[0] < 1 or ascending[-1] > num_layers:
        raise InvalidRequestError(f"exit layers {list(layers)} must lie within 1 to {num_layers}")
    if len(ascending) == 1:
        raise InvalidRequestError(f"name at least one exit layer before the last ({num_layers})")
    return ascending


class _Tuning:
    """A run in progress: the heads, their optimiser and the position in the text."""

    def __init__(
        self, reader: ExitReader, windows: WindowStream, options: TuningOptions, length: int, directory: Path
    ) -> None:
        self._reader = reader
        self._windows = windows
        self._options = options
        self._length = length
        self._directory = directory
        self._log = LossLog(directory / "log.jsonl")
        self._step = 0
        self._identity: dict[str, Any] = {}
        parameters = reader.heads.own_parameters()
        self._optimiser = (
            torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0) if parameters else None
        )

    def resume(self, identity: dict[str, Any]) -> None:
        """Resume from the state directory, or start. `identity` must be the same as in the saved run."""
        self._identity = identity
        path = self._directory / "state.pt"
        self._directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._log.cut(0)
            first = torch.from_numpy(self._windows.batch(0, 1, self._length))
            self._windows.drawn.clear()
            states, _ = self._reader.states(first[:, :-1])
            self._reader.heads.start_from(states)
            return
        state = load_state(path)
        if state["identity"] != identity:
            raise CheckpointError(
                f"{path} is of another run ({state['identity']}); delete it, or choose another --state"
            )
        self._reader.heads.load_state_dict(state["heads"])
        assert self._optimiser is not None
        self._optimiser.load_state_dict(state["optimiser"])
        self._windows.drawn.update(state["drawn"])
        self._step = state["step"]
        self._log.cut(self._step)

    def run(self, progress: Callable[[Progress], None] | None) -> None:
        options = self._options
        started, first, saved = time.monotonic(), self._step, time.monotonic()
        while self._step < options.steps:
            loss = self._run_step()
            self._log.append({"step": self._step, "loss": loss["last"], "exit_loss": loss["exits"]})
            if progress is not None:
                rate = (time.monotonic() - started) / (self._step - first)
                progress(
                    Progress(self._step, options.steps, loss["exits"], rate * (options.steps - self._step))
                )
            if time.monotonic() - saved > 60 * options.save_minutes:
                self._save()
                saved = time.monotonic()
        self._save()
        self._log.plot(self._directory / "loss.png")

    def finish(self) -> None:
        """Delete the state of a finished run. The log and its plot stay."""
        (self._directory / "state.pt").unlink(missing_ok=True)

    def _save(self) -> None:
        assert self._optimiser is not None
        state = {
            "identity": self._identity,
            "heads": self._reader.heads.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "drawn": dict(self._windows.drawn),
            "step": self._step,
        }
        save_state(self._directory / "state.pt", state)

    def _run_step(self) -> dict[str, float]:
        options, reader = self._options, self._reader
        assert self._optimiser is not None
        self._optimiser.param_groups[0]["lr"] = options.lr * (1 - self._step / options.steps)
        rows = max(1, options.tokens_per_step // self._length)
        windows = torch.from_numpy(self._windows.batch(self._step, rows, self._length))
        targets = windows[:, 1:].flatten()
        states, last = reader.states(windows[:, :-1])
        last_loss, exit_loss, count = 0.0, 0.0, len(targets)
        for start in range(0, count, _LOSS_ROWS):
            chunk = slice(start, start + _LOSS_ROWS)
            target = targets[chunk]
            teacher = reader.last_logits(last.flatten(0, 1)[chunk]).log_softmax(dim=-1)  # [chunk, vocab]
            last_loss += F.nll_loss(teacher, target, reduction="sum").item()
            for layer, state in states.items():
                student = reader.early_logits(layer, state.flatten(0, 1)[chunk]).log_softmax(dim=-1)
                cross_entropy = F.nll_loss(student, target, reduction="sum")
                distance = F.kl_div(student, teacher, reduction="sum", log_target=True)
                loss: Tensor = options.exit_weight * cross_entropy + options.distill_weight * distance
                (loss / count).backward()
                exit_loss += cross_entropy.item() / len(states)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._step += 1
        return {"last": last_loss / count, "exits": exit_loss / count}


def _link_checkpoint(source: Path, target: Path) -> None:
    """Link or copy the files of `source`, except its facts about exits and its card."""
    for path in source.iterdir():
        if path.is_file() and path.name not in (FACTS_FILE, EXITS_FILE, TOKENIZER_FILE, "README.md"):
            try:
                os.link(path.resolve(), target / path.name)
            except OSError:
                shutil.copyfile(path, target / path.name)


def main() -> None:
    defaults = TuningOptions()
    parser = argparse.ArgumentParser(prog="python -m training.add_exits", description=__doc__)
    parser.add_argument("source", type=Path, help="an OPT checkpoint directory")
    parser.add_argument("target", type=Path, help="directory to write")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="UTF-8 files, or .jsonl with text"
    )
    parser.add_argument("--exit-layers", type=int, nargs="+", help="default: every quarter")
    parser.add_argument("--head", choices=["linear", "norm", "shared"], default="linear")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--tokens-per-step", type=int, default=defaults.tokens_per_step)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--state", type=Path, help="default: ~/.cache/helios/training/add-exits-NAME")
    parser.add_argument("--force", action="store_true", help="replace the target")
    arguments = parser.parse_args()

    def show(now: Progress) -> None:
        end = "\n" if now.step == now.steps else "\r"
        print(
            f"step {now.step}/{now.steps} loss {now.loss:.3f} {now.seconds_left:.0f} s left ",
            end=end,
            flush=True,
        )

    add_exits(
        arguments.source,
        arguments.target,
        exit_layers=arguments.exit_layers,
        head=arguments.head,
        texts=arguments.text,
        options=TuningOptions(
            steps=arguments.steps, tokens_per_step=arguments.tokens_per_step, lr=arguments.lr
        ),
        state=arguments.state,
        force=arguments.force,
        progress=show,
    )
    print(f"{arguments.target} is written")


if __name__ == "__main__":
    try:
        main()
    except HeliosError as error:
        sys.exit(f"error: {error}")
