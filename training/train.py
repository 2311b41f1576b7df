"""Joint training of an early-exit OPT: `python -m training.train --config training/configs/prose.json`.

Every step reads the last layer and some exits through the shared final norm and LM head (the joint loss of
LayerSkip and EE-LLM, a random part of the exits at a time). The learning rate is constant, then falls to zero
over the last part (warmup-stable-decay), so that a run can be lengthened or shortened while it is stable:
change `--steps` and start again. A run resumes by itself from its state directory. `--start` goes on
training an exported checkpoint whose state is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from helios.catalog import read_model
from helios.errors import CheckpointError, HeliosError, SettingsError
from training.checkpoint import load_state, save_state
from training.corpora import DEFAULT_DIRECTORY
from training.loss import exit_cross_entropies, joint_loss
from training.loss_log import LossLog
from training.model import EarlyExitOPT, ModelShape
from training.muon import Muon
from training.stream import Tokens, WindowStream, held_out_windows, load_tokens

STATE_ROOT = Path("~/.cache/helios/training").expanduser()


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run.

    lengths: window lengths that steps use in turn; every step has `tokens_per_step` tokens. exit_rates: for
    each exit before the last layer, the share of steps that read it. A step may read several exits, or none.
    """

    name: str
    shape: ModelShape
    domains: Mapping[str, float]
    own_domains: tuple[str, ...]
    steps: int
    exit_rates: tuple[float, ...]
    tokens_per_step: int = 2048
    lengths: tuple[int, ...] = (256, 256, 256, 512)
    warmup_steps: int = 100
    decay_share: float = 0.4
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    weight_decay: float = 0.1
    exit_weight: float = 0.25
    distill_weight: float = 0.5
    seed: int = 0

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """Read a config file. Raises SettingsError that names the fault."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise SettingsError(f"config {path} does not exist; see training/configs/") from None
        except json.JSONDecodeError as error:
            raise SettingsError(f"config {path} is not JSON: {error}") from None
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise SettingsError(f"config {path}: unknown {unknown}; known are {sorted(known)}")
        try:
            shape = raw["shape"] | {"exit_layers": tuple(raw["shape"]["exit_layers"])}
            lists: dict[str, Any] = {
                key: tuple(raw[key]) for key in ("own_domains", "lengths", "exit_rates") if key in raw
            }
            config = cls(**(raw | lists | {"shape": ModelShape(**shape)}))
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"config {path}: {error}") from None
        for name in ("steps", "tokens_per_step", "matrix_lr", "vector_lr"):
            if not isinstance(value := getattr(config, name), int | float) or value <= 0:
                raise SettingsError(f"config {path}: {name} must be a number above 0, not {value!r}")
        for length in config.lengths:
            if length > config.shape.context or config.tokens_per_step % length:
                raise SettingsError(
                    f"config {path}: length {length} must divide tokens_per_step {config.tokens_per_step} "
                    f"and fit the context {config.shape.context}"
                )
        exits = config.shape.exit_layers[:-1]
        if len(config.exit_rates) != len(exits) or not all(0 <= rate <= 1 for rate in config.exit_rates):
            raise SettingsError(
                f"config {path}: exit_rates needs a share of steps (0 to 1) for each of the exits {exits}"
            )
        if missing := set(config.own_domains) - set(config.domains):
            raise SettingsError(f"config {path}: own_domains {sorted(missing)} are not in domains")
        return config


def learning_rate_factor(
    step: int, steps: int, warmup_steps: int, decay_share: float, first_step: int = 0
) -> float:
    """Warmup-stable-decay: the factor of the peak learning rates at `step` of `steps`.

    first_step: the step at which the optimisers began without a state. The rates warm up from there.
    """
    decay_steps = max(1, round(steps * decay_share))
    warmup = min(1.0, (step - first_step + 1) / max(1, warmup_steps))
    return warmup * min(1.0, max(0.0, (steps - step) / decay_steps))


class Training:
    """A run in progress: model, optimisers, position in the data, and the log."""

    def __init__(
        self, config: TrainConfig, directory: Path, streams: Mapping[str, Tokens], held: Mapping[str, Tokens]
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.directory = directory
        self.held = held
        self.step = 0
        self.first_step = 0  # first step of these optimisers; above 0 when the weights come from a checkpoint
        self.seconds = 0.0  # training time, over all resumed runs
        self.model = EarlyExitOPT(config.shape)
        self.muon = Muon(self.model.matrices(), lr=config.matrix_lr, weight_decay=config.weight_decay)
        self.adamw = torch.optim.AdamW(
            self.model.vectors(), lr=config.vector_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.windows = WindowStream(streams, config.domains, config.seed, {})
        directory.mkdir(parents=True, exist_ok=True)
        self.log = LossLog(directory / "log.jsonl")

    def start_from(self, checkpoint: Path) -> None:
        """Take over an exported checkpoint: its weights, and the steps and hours of its training."""
        facts = read_model(checkpoint).facts
        tensors, views = load_file(checkpoint / "model.safetensors"), self.model.hf_views()
        for name, view in views.items():
            if name not in tensors or tensors[name].shape != view.shape:
                raise CheckpointError(f"{checkpoint} is of another shape than the config: see its {name}")
        for name, view in views.items():
            view.copy_(tensors[name])
        self.step = self.first_step = int(facts.training.get("steps", 0))
        self.seconds = float(facts.training.get("hours", 0)) * 3600

    def resume(self) -> bool:
        """Resume from the checkpoint in the state directory, if any. Raises CheckpointError if it is bad."""
        path = self.directory / "state.pt"
        if not path.exists():
            self.log.cut(0)
            return False
        state = load_state(path)
        # the choice of exits changes no weight, so it may differ
        if state["shape"] | {"exit_layers": None} != self.config.shape.as_dict() | {"exit_layers": None}:
            raise CheckpointError(
                f"{path} holds a model of another shape ({state['shape']}); use another --state, or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.windows.drawn.update(state["drawn"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.first_step = state.get("first_step", 0)
        torch.set_rng_state(state["rng"])
        self.log.cut(self.step)
        return True

    def save(self, name: str = "state.pt") -> None:
        state = {
            "shape": self.config.shape.as_dict(),
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "drawn": dict(self.windows.drawn),
            "step": self.step,
            "first_step": self.first_step,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
            "config": asdict(self.config),
        }
        save_state(self.directory / name, state)

    def run_step(self) -> dict[str, float]:
        """Run one optimiser step. Returns its losses in nats per token."""
        config, step = self.config, self.step
        started = time.monotonic()
        factor = learning_rate_factor(
            step, config.steps, config.warmup_steps, config.decay_share, self.first_step
        )
        for optimiser, peak in ((self.muon, config.matrix_lr), (self.adamw, config.vector_lr)):
            optimiser.param_groups[0]["lr"] = peak * factor
        length = config.lengths[step % len(config.lengths)]
        windows = torch.from_numpy(self.windows.batch(step, config.tokens_per_step // length, length))
        draw = random.Random(f"{config.seed} {step}")
        exits = tuple(
            layer
            for layer, rate in zip(config.shape.exit_layers[:-1], config.exit_rates, strict=True)
            if draw.random() < rate
        )
        hidden = self.model(windows[:, :-1], (*exits, config.shape.num_layers), torch.bfloat16)
        *early, last = (state.flatten(0, 1) for state in hidden)
        head = self.model.embed_tokens.bfloat16()
        loss, exit_loss = joint_loss(
            last, early, head, windows[:, 1:].flatten(), config.exit_weight, config.distill_weight
        )
        if not torch.isfinite(loss):
            raise SettingsError(f"the loss is {loss.item()} at step {step}: lower matrix_lr or vector_lr")
        loss.backward()
        for optimiser in (self.muon, self.adamw):
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        self.seconds += time.monotonic() - started
        return {"loss": loss.item(), "exit_loss": exit_loss.item(), "lr": factor}

    @torch.no_grad()
    def evaluate(self) -> dict[str, list[float]]:
        """Held-out cross-entropy in nats per token, by domain: one figure per exit layer."""
        figures = {}
        for domain, windows in self.held.items():
            total = torch.zeros(len(self.config.shape.exit_layers))
            for rows in torch.from_numpy(windows).split(4):
                total += exit_cross_entropies(self.model, rows) * len(rows)
            figures[domain] = [round(value, 4) for value in (total / len(windows)).tolist()]
        return figures


class _Stop:
    """Inside this context SIGTERM and SIGINT only set `asked`. The run ends after its step and saves."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def train(training: Training, *, save_minutes: float, eval_steps: int, log_steps: int) -> bool:
    """Train to the last step. Returns False if a signal ended it early. The state is saved in both cases."""
    with _Stop() as stop:
        _train(training, stop, save_minutes=save_minutes, eval_steps=eval_steps, log_steps=log_steps)
    training.save()
    training.log.plot(training.directory / "loss.png")
    return training.step >= training.config.steps


def _train(training: Training, stop: _Stop, *, save_minutes: float, eval_steps: int, log_steps: int) -> None:
    config = training.config
    decay_start = config.steps - round(config.steps * config.decay_share)
    saved, window = time.monotonic(), (time.monotonic(), training.step)
    losses: list[dict[str, float]] = []
    while training.step < config.steps and not stop.asked:
        if training.step == decay_start:
            training.save("stable.pt")  # a longer run resumes from this
        losses.append(training.run_step())
        last_step = training.step == config.steps
        if training.step % log_steps == 0 or last_step:
            now = time.monotonic()
            rate = (training.step - window[1]) * config.tokens_per_step / (now - window[0])
            entry: dict[str, Any] = {
                "step": training.step,
                "loss": round(sum(item["loss"] for item in losses) / len(losses), 4),
                "exit_loss": round(sum(item["exit_loss"] for item in losses) / len(losses), 4),
                "lr": round(losses[-1]["lr"], 5),
                "tokens_per_second": round(rate),
            }
            if training.step % eval_steps == 0 or last_step:
                entry["held"] = training.evaluate()
            training.log.append(entry)
            eta = (config.steps - training.step) * config.tokens_per_step / rate / 60
            print(f"{training.step}/{config.steps} {json.dumps(entry)} eta {eta:.0f} min", flush=True)
            losses, window = [], (time.monotonic(), training.step)
        if time.monotonic() - saved > 60 * save_minutes:
            training.save()
            training.log.plot(training.directory / "loss.png")
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--corpora", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--state", type=Path, help="default: ~/.cache/helios/training/NAME")
    parser.add_argument("--start", type=Path, help="an exported checkpoint to train on, with its tokenizer")
    parser.add_argument("--steps", type=int, help="instead of the config's; the schedule follows")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--eval-steps", type=int, default=250)
    parser.add_argument("--log-steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = TrainConfig.read(arguments.config)
    if arguments.steps is not None:
        config = replace(config, steps=arguments.steps)
    tokenizer_path = (arguments.start or arguments.corpora / "tokenizer") / "tokenizer.json"
    if not tokenizer_path.exists():
        raise SettingsError(f"{tokenizer_path} does not exist: run `python -m training.tokenizer` first")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    streams = {
        domain: load_tokens(arguments.corpora, tokenizer, domain, "train") for domain in config.domains
    }
    held = {
        domain: held_out_windows(
            load_tokens(arguments.corpora, tokenizer, domain, "held"), config.shape.context, 16
        )
        for domain in config.domains
    }
    directory = arguments.state or STATE_ROOT / config.name
    training = Training(config, directory, streams, held)
    resumed = training.resume()
    if not resumed and arguments.start is not None:
        training.start_from(arguments.start)
    print(
        f"{'resuming' if resumed else 'starting'} {config.name} at step {training.step}/{config.steps}",
        flush=True,
    )
    finished = train(
        training,
        save_minutes=arguments.save_minutes,
        eval_steps=arguments.eval_steps,
        log_steps=arguments.log_steps,
    )
    if not finished:
        print(f"stopped at step {training.step}; the same command goes on from there", flush=True)


if __name__ == "__main__":
    try:
        main()
    except HeliosError as error:
        sys.exit(f"error: {error}")
