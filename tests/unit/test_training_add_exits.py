"""Exits for a frozen checkpoint: heads are tuned, thresholds are calibrated, weights stay unchanged."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from helios.catalog import ExitHeadKind, read_model
from helios.errors import CheckpointError, InvalidRequestError
from tests.opt_variants import save_variant
from training.add_exits import Progress, TuningOptions, add_exits
from training.calibration import calibrate_threshold
from training.exit_reader import ExitReader

OPTIONS = TuningOptions(steps=30, tokens_per_step=256, length=64, lr=0.01)


def text_file(directory: Path) -> Path:
    path = directory / "text.txt"
    path.write_text("In the beginning was the word. " * 100)
    return path


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm", "no-affine", "no-final-norm"])
@pytest.mark.parametrize("head", ["norm", "linear"])
def test_tuned_heads_lose_less_than_those_they_start_from(
    tmp_path: Path, variant: str, head: ExitHeadKind
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save_variant(source, variant, seed=1)
    seen: list[Progress] = []
    add_exits(
        source,
        target,
        exit_layers=[2, 4],
        head=head,
        texts=[text_file(tmp_path)],
        options=OPTIONS,
        state=tmp_path / "state",
        progress=seen.append,
    )
    assert [now.step for now in seen] == list(range(1, 31))
    assert seen[-1].loss < seen[0].loss - 0.1
    entry = read_model(target)
    assert entry.exit_layers == (2, 4, 6)
    assert entry.facts.exit_head == head
    assert entry.facts.thresholds[6] == 0.0
    assert entry.tokenizer_id == entry.facts.tokenizer_id
    shared = (source / "model.safetensors").stat().st_ino
    assert (target / "model.safetensors").stat().st_ino == shared  # a link, not a copy
    tensors = load_file(target / "exits.safetensors")
    assert ("exits.4.linear.weight" in tensors) == (head == "linear")
    assert (tmp_path / "state/loss.png").exists()
    assert not (tmp_path / "state/state.pt").exists()


def test_heads_start_from_how_the_last_layer_is_read(tmp_path: Path) -> None:
    for variant in ("pre-norm", "post-norm"):
        source, target = tmp_path / variant, tmp_path / f"{variant}-exits"
        save_variant(source, variant, seed=1)
        options = TuningOptions(steps=1, tokens_per_step=64, length=64, lr=0.0)
        add_exits(source, target, texts=[text_file(tmp_path)], options=options, state=tmp_path / "state")
        reader = ExitReader.open(target, read_model(target).exit_layers, "linear")
        ids = torch.arange(4, 68)[None]
        states, _ = reader.states(ids)
        decoder = reader.model.model.decoder
        state = states[4]
        expected = state if decoder.final_layer_norm is None else decoder.final_layer_norm(state)
        found = reader.heads(4, state)
        assert (found - expected).norm() < 0.2 * expected.norm()


def test_interrupted_tuning_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_variant(source, "pre-norm", seed=1)
    text, whole, parts = text_file(tmp_path), tmp_path / "whole", tmp_path / "parts"
    options = TuningOptions(steps=8, tokens_per_step=128, length=64, lr=0.01, save_minutes=0)
    add_exits(source, whole, texts=[text], options=options, state=tmp_path / "state-whole")

    def interrupt(now: Progress) -> None:
        if now.step == 5:
            raise KeyboardInterrupt

    state = tmp_path / "state-parts"
    with pytest.raises(KeyboardInterrupt):
        add_exits(source, parts, texts=[text], options=options, state=state, progress=interrupt)
    assert not parts.exists()
    add_exits(source, parts, texts=[text], options=options, state=state)
    for name, tensor in load_file(whole / "exits.safetensors").items():
        torch.testing.assert_close(load_file(parts / "exits.safetensors")[name], tensor, atol=0, rtol=0)
    assert len((state / "log.jsonl").read_text().splitlines()) == 8


def test_shared_exits_need_no_tuning(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save_variant(source, "pre-norm", seed=1)
    add_exits(
        source, target, head="shared", texts=[text_file(tmp_path)], options=OPTIONS, state=tmp_path / "state"
    )
    entry = read_model(target)
    assert entry.exit_layers == (2, 3, 4, 6)
    assert not (target / "exits.safetensors").exists()
    assert json.loads((target / "helios.json").read_text())["training"]["perplexity"]["6"] > 1


def test_bad_arguments_are_refused_before_any_work(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save_variant(source, "pre-norm", seed=1)
    text = text_file(tmp_path)
    with pytest.raises(InvalidRequestError, match="within 1 to 6"):
        add_exits(source, target, exit_layers=[2, 7], texts=[text], options=OPTIONS)
    with pytest.raises(InvalidRequestError, match="before the last"):
        add_exits(source, target, exit_layers=[6], texts=[text], options=OPTIONS)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InvalidRequestError, match="tuning needs at least"):
        add_exits(source, target, texts=[short], options=OPTIONS)
    with pytest.raises(InvalidRequestError, match="cannot be read as text"):
        add_exits(source, target, texts=[tmp_path / "absent.txt"], options=OPTIONS)
    with pytest.raises(CheckpointError, match="exists"):
        add_exits(source, source, texts=[text], options=OPTIONS)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60))
def test_calibrated_threshold_is_the_lowest_that_agrees_enough(tokens: list[tuple[float, bool]]) -> None:
    confidence = torch.tensor([token[0] for token in tokens])
    agrees = torch.tensor([token[1] for token in tokens])

    def agreement(threshold: float) -> float | None:
        above = agrees[confidence.double() >= threshold]
        return above.double().mean().item() if len(above) else None

    found = calibrate_threshold(confidence, agrees, target=0.9)
    assert 0 <= found <= 1
    reached = agreement(found)
    if found < 1:
        assert reached is not None
        assert reached >= 0.9
    assert all((agreement(lower) or 0) < 0.9 for lower in confidence.tolist() if lower < found)
