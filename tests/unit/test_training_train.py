"""Joint training: the loss, the optimiser, resuming, and a checkpoint that transformers reads."""

import json
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OPTForCausalLM

from helios.catalog import read_model
from helios.errors import CheckpointError, SettingsError
from tests.opt_variants import save_tokenizer
from training.attention import causal_attention
from training.checkpoint import load_state, save_state
from training.export import export_model
from training.loss import joint_loss
from training.model import EarlyExitOPT, ModelShape
from training.muon import orthogonalise
from training.stream import Tokens, WindowStream, held_out_windows
from training.train import TrainConfig, Training, learning_rate_factor, train

SHAPE = ModelShape(
    num_layers=3, hidden_size=32, num_heads=2, vocab_size=64, context=32, exit_layers=(1, 2, 3)
)


def config(steps: int = 6, **changes: object) -> TrainConfig:
    fields: dict[str, object] = {
        "name": "tiny",
        "shape": SHAPE,
        "domains": {"count": 0.7, "noise": 0.3},
        "own_domains": ("count",),
        "steps": steps,
        "tokens_per_step": 64,
        "lengths": (16, 32),
        "warmup_steps": 2,
        "exit_rates": (0.5, 1.0),
    }
    return TrainConfig(**(fields | changes))  # type: ignore[arg-type]


def texts() -> dict[str, Tokens]:
    rng = np.random.default_rng(0)
    return {"count": np.arange(2000) % 40 + 4, "noise": rng.integers(4, 64, 2000)}


def training(directory: Path, steps: int = 6, **changes: object) -> Training:
    streams = texts()
    held = {"count": held_out_windows(streams["count"], 32, 4)}
    return Training(config(steps, **changes), directory, streams, held)


def test_causal_attention_equals_torchs_forward_and_backward() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 300, 8, requires_grad=True) for _ in range(3)]
    grad = torch.randn(3, 300, 8)
    found = causal_attention(*inputs)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found_grads = torch.autograd.grad(found, inputs, grad)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_joint_loss_has_the_gradients_of_cross_entropy_plus_distillation(count: int) -> None:
    torch.manual_seed(0)
    last, *exits = (torch.randn(300, 16, requires_grad=True) for _ in range(1 + count))
    head = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (300,))
    loss, exit_loss = joint_loss(last, exits, head, targets, 0.25, 0.5)
    found = torch.autograd.grad(loss, (last, head, *exits))
    teacher = (last @ head.T).log_softmax(-1)
    cross_entropy = expected_loss = F.nll_loss(teacher, targets)
    exit_cross_entropies = []
    for early in exits:
        student = (early @ head.T).log_softmax(-1)
        exit_cross_entropies.append(F.nll_loss(student, targets))
        distance = F.kl_div(student, teacher.detach(), log_target=True, reduction="batchmean")
        expected_loss = expected_loss + 0.25 * exit_cross_entropies[-1] + 0.5 * distance
    expected = torch.autograd.grad(expected_loss, (last, head, *exits))
    mean = torch.stack(exit_cross_entropies).mean() if exits else torch.zeros(())
    torch.testing.assert_close((loss, exit_loss), (cross_entropy, mean))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (4, 48, 16), (4, 16, 48)])
def test_orthogonalise_brings_every_singular_value_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = orthogonalise(torch.randn(shape), steps=5).float()
    assert found.shape == shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 10, 0.4) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:61] == [1.0] * 52
    assert factors[80] == pytest.approx(0.5)
    assert factors[100] == 0.0
    # New optimisers warm up at any step.
    assert learning_rate_factor(80, 100, 10, 0.4, first_step=80) == pytest.approx(0.05)
    assert learning_rate_factor(95, 100, 10, 0.4, first_step=80) == factors[95]


def test_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = training(tmp_path / "whole")
    losses = [whole.run_step() for _ in range(6)]
    first = training(tmp_path / "parts")
    found = [first.run_step() for _ in range(3)]
    first.log.append({"step": 3})
    first.log.append({"step": 4})
    first.save()
    second = training(tmp_path / "parts")
    assert second.resume()
    assert second.log.entries() == [{"step": 3}]
    found += [second.run_step() for _ in range(3)]
    assert found == losses


def test_changed_steps_change_the_schedule_of_a_resumed_run(tmp_path: Path) -> None:
    first = training(tmp_path, steps=4)
    for _ in range(4):
        first.run_step()
    first.save()
    longer = training(tmp_path, steps=100)
    longer.resume()
    assert longer.run_step()["lr"] == 1.0


def test_damaged_state_is_refused_with_the_files_name(tmp_path: Path) -> None:
    run = training(tmp_path)
    run.save()
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read .* delete it"):
        training(tmp_path).resume()


def test_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    training(tmp_path).save()
    other = ModelShape(2, 32, 2, 64, 32, (1, 2))
    with pytest.raises(CheckpointError, match="another shape"):
        training(tmp_path, shape=other).resume()


def test_resumed_run_may_have_other_exits(tmp_path: Path) -> None:
    first = training(tmp_path)
    first.run_step()
    first.save()
    other = training(tmp_path, shape=replace(SHAPE, exit_layers=(2, 3)), exit_rates=(1.0,))
    assert other.resume()
    other.run_step()
    assert len(other.evaluate()["count"]) == 2


def test_exit_is_read_in_its_share_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(tmp_path, steps=40, exit_rates=(0.25, 1.0))
    read: list[tuple[int, ...]] = []
    forward = EarlyExitOPT.forward

    def remember(
        model: EarlyExitOPT, tokens: Tensor, exits: tuple[int, ...], dtype: torch.dtype
    ) -> list[Tensor]:
        read.append(exits)
        return forward(model, tokens, exits, dtype)

    monkeypatch.setattr(EarlyExitOPT, "forward", remember)
    for _ in range(40):
        run.run_step()
    assert set(read) == {(1, 2, 3), (2, 3)}
    assert 4 <= read.count((1, 2, 3)) <= 16


def test_failed_save_leaves_the_previous_state(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_state(path, {"step": lambda: None})
    assert load_state(path) == {"step": 1}


def test_training_learns_logs_and_exports_what_transformers_computes(tmp_path: Path) -> None:
    run = training(tmp_path / "run", steps=60, domains={"count": 1.0, "noise": 1e-9})
    assert train(run, save_minutes=10, eval_steps=30, log_steps=30)
    entries = run.log.entries()
    assert [entry["step"] for entry in entries] == [30, 60]
    assert entries[1]["held"]["count"][-1] < 1.5 < entries[0]["loss"]  # counting to 40 is easy to learn
    assert (tmp_path / "run/loss.png").stat().st_size > 0
    assert load_state(tmp_path / "run/stable.pt")["step"] == 36

    save_tokenizer(tmp_path)
    export_model(tmp_path / "run/state.pt", tmp_path / "model", tmp_path)
    entry = read_model(tmp_path / "model")
    assert entry.exit_layers == (1, 2, 3)
    assert entry.facts.training["steps"] == 60
    exported = OPTForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.from_numpy(texts()["count"][None, :20])
    model = EarlyExitOPT(SHAPE)
    model.load_state_dict({name: value.bfloat16().float() for name, value in run.model.state_dict().items()})
    with torch.no_grad():
        (hidden,) = model(ids, (3,), torch.float32)
        torch.testing.assert_close(hidden @ model.embed_tokens.T, exported(ids).logits, atol=1e-4, rtol=1e-4)


def test_an_exported_checkpoint_is_trained_on(tmp_path: Path) -> None:
    run = training(tmp_path / "run", steps=20)
    train(run, save_minutes=10, eval_steps=20, log_steps=20)
    save_tokenizer(tmp_path)
    export_model(tmp_path / "run/state.pt", tmp_path / "model", tmp_path)
    further = training(tmp_path / "further", steps=30)
    further.start_from(tmp_path / "model")
    assert (further.step, further.first_step) == (20, 20)
    for name, weights in further.model.state_dict().items():
        assert torch.equal(weights, run.model.state_dict()[name].bfloat16().float()), name
    assert train(further, save_minutes=10, eval_steps=30, log_steps=10)
    resumed = training(tmp_path / "further", steps=40)
    assert resumed.resume()
    assert (resumed.step, resumed.first_step) == (30, 20)


def test_a_checkpoint_of_another_shape_is_not_trained_on(tmp_path: Path) -> None:
    run = training(tmp_path / "run", steps=1)
    run.save()
    save_tokenizer(tmp_path)
    export_model(tmp_path / "run/state.pt", tmp_path / "model", tmp_path)
    deeper = replace(SHAPE, num_layers=4, exit_layers=(1, 2, 4))
    other = training(tmp_path / "other", shape=deeper)
    before = {name: weights.clone() for name, weights in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"another shape than the config: see its .*layers\.3"):
        other.start_from(tmp_path / "model")
    assert all(torch.equal(weights, before[name]) for name, weights in other.model.state_dict().items())


def test_windows_cover_a_text_once_a_pass_and_start_as_served_sequences_do() -> None:
    text = np.arange(10, 1010)
    windows = WindowStream({"text": text}, {"text": 1.0}, seed=3, drawn={})
    drawn = windows.batch(0, rows=9, length=100)
    assert (drawn[:, 0] == 2).all()
    starts = sorted(drawn[:, 1] - 1)
    assert [later - earlier for earlier, later in pairwise(starts)] == [100] * 8


def test_held_out_windows_refuse_a_text_shorter_than_one() -> None:
    with pytest.raises(SettingsError, match="shorter than a window of 32"):
        held_out_windows(np.arange(20), 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, r"unknown \['stepz'\]"),
        ({"steps": 0}, "steps"),
        ({"lengths": [48]}, "length 48 must divide"),
        ({"own_domains": ["poems"]}, "poems"),
        ({"exit_rates": [1]}, "exit_rates needs a share of steps"),
        ({"exit_rates": [1, 1.5]}, "exit_rates needs a share of steps"),
        ({"shape": {"num_layers": 2}}, "exit_layers"),
    ],
)
def test_bad_config_is_refused_with_what_is_wrong(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    good: dict[str, object] = {
        "name": "tiny",
        "shape": SHAPE.as_dict(),
        "domains": {"kjv": 1.0},
        "own_domains": ["kjv"],
        "steps": 4,
        "lengths": [32],
        "exit_rates": [0.5, 1],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(good))
    assert TrainConfig.read(path).shape == SHAPE
    path.write_text(json.dumps(good | change))
    with pytest.raises(SettingsError, match=message):
        TrainConfig.read(path)


def test_bundled_configs_are_valid() -> None:
    paths = list((Path(__file__).parents[2] / "training/configs").glob("*.json"))
    assert len(paths) == 2
    for path in paths:
        assert TrainConfig.read(path).name == f"helios-{path.stem}"


def test_sigterm_ends_a_run_after_its_step_with_the_state_saved(tmp_path: Path) -> None:
    run = training(tmp_path, steps=1000)
    before = signal.getsignal(signal.SIGTERM)
    step = run.run_step

    def step_and_be_told_to_stop() -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return step()

    run.run_step = step_and_be_told_to_stop  # type: ignore[method-assign]
    assert not train(run, save_minutes=10, eval_steps=100, log_steps=100)
    assert load_state(tmp_path / "state.pt")["step"] == 1
    assert signal.getsignal(signal.SIGTERM) is before
