"""Exits for a frozen checkpoint: heads are tuned, thresholds are calibrated, weights stay unchanged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from helios.catalog import EarlyExitFacts, ExitHeadKind, read_model
from helios.engine import Engine, EngineSettings, Output, SamplingParams
from helios.engine.tokenizer import load_tokenizer
from helios.errors import CheckpointError, InvalidRequestError
from helios.weights_digest import weights_digest
from tests import llama_variants, opt_variants
from training.add_exits import Progress, _chosen_pieces, add_exits
from training.calibration import calibrate_threshold
from training.exit_reader import ExitFacts, ExitReader
from training.passages import pieces, read_passages
from training.tuning import TuningOptions

OPTIONS = TuningOptions(steps=30, tokens_per_step=256, length=64, lr=0.01)


# Variants of OPT, and of Llama's kind.
VARIANTS = ["pre-norm", "post-norm", "no-affine", "no-final-norm", "llama", "tied", "qwen2", "qwen3"]


def save_variant(path: Path, variant: str, seed: int) -> None:
    kind = opt_variants if variant in opt_variants.VARIANTS else llama_variants
    kind.save_variant(path, variant, seed)


def text_file(directory: Path) -> Path:
    path = directory / "text.txt"
    path.write_text("In the beginning was the word. " * 100)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
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
        options=replace(OPTIONS, exit_weight=1.0, distill_weight=0.0),
        state=tmp_path / "state",
        progress=seen.append,
    )
    tuning = [now for now in seen if now.stage == "tuning"]
    assert [now.step for now in tuning] == list(range(1, 31))
    assert seen[0].stage == "reading"
    losses = [now.loss for now in tuning if now.loss is not None]
    assert sum(losses[-10:]) < sum(losses[:10])  # steps have different texts
    entry = read_model(target)
    assert entry.exit_layers == (2, 4, 6)
    assert entry.facts.exit_head == head
    assert entry.facts.thresholds[6] == 0.0
    assert entry.tokenizer_id == entry.facts.tokenizer_id
    shared = (source / "model.safetensors").stat().st_ino
    assert (target / "model.safetensors").stat().st_ino == shared  # a link, not a copy
    tensors = load_file(target / "exits.safetensors")
    assert ("exits.4.linear.weight" in tensors) == (head == "linear")
    left = {path.name for path in (tmp_path / "state").iterdir()}
    assert left == {"log.jsonl", "loss.png"}


def grown(tmp_path: Path, variant: str, head: ExitHeadKind, **options: float) -> Path:
    """A random model with exits after layers 2 and 4 of 6."""
    source, target = tmp_path / variant, tmp_path / f"{variant}-exits"
    save_variant(source, variant, seed=1)
    chosen = TuningOptions(**{"steps": 10, "tokens_per_step": 256, "length": 64, "lr": 0.01} | options)
    state = tmp_path / f"state-{variant}"
    add_exits(
        source,
        target,
        exit_layers=[2, 4],
        head=head,
        texts=[text_file(tmp_path)],
        options=chosen,
        state=state,
    )
    return target


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm", "llama"])
def test_norms_start_from_how_the_last_layer_is_read(tmp_path: Path, variant: str) -> None:
    reader = ExitReader.open(grown(tmp_path, variant, "norm", lr=0.0), (2, 4, 6), "norm")
    state = reader.states(torch.arange(4, 68)[None])[4]
    expected = state if reader.final_norm is None else reader.final_norm(state)
    assert (reader.heads(4, state) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm", "llama"])
def test_matrices_start_nearer_to_the_last_layer_than_norms_alone(tmp_path: Path, variant: str) -> None:
    reader = ExitReader.open(grown(tmp_path, variant, "linear", lr=0.0), (2, 4, 6), "linear")
    text = torch.tensor([2, *("In the beginning was the word. " * 2).encode()]) % 264
    states = reader.states(text[None])
    last = reader.read(6, states[6])
    for layer in (2, 4):
        normed = reader.heads.normed(layer, states[layer])
        assert (reader.heads(layer, states[layer]) - last).norm() < 0.9 * (normed - last).norm()


@pytest.mark.parametrize("variant", ["post-norm", "llama", "tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("head", ["shared", "norm", "linear"])
def test_the_engine_reads_exits_as_they_were_tuned(tmp_path: Path, variant: str, head: ExitHeadKind) -> None:
    target = grown(tmp_path, variant, head, steps=2)
    reader = ExitReader.open(target, (2, 4, 6), head)
    prompt = [2, 10, 20, 30, 200]
    for depth in reader.exit_layers:
        engine = Engine.load(target, depth, EngineSettings(memory_bytes=64 << 20))
        outputs: list[Output] = []
        engine.submit("one", prompt, SamplingParams(max_tokens=6, ignore_eos=True), outputs.append)
        while engine.step():
            pass
        tokens = [token for output in outputs for token in output.tokens]
        ids = torch.tensor([prompt + [token.token_id for token in tokens]])
        state = reader.states(ids[:, :-1])[depth][0, len(prompt) - 1 :]
        facts = ExitFacts.of(reader.logits(depth, state), ids[0, len(prompt) :])
        assert [token.token_id for token in tokens] == facts.top.tolist()
        found = torch.tensor([token.logprob for token in tokens])
        torch.testing.assert_close(found, facts.log_probability, atol=1e-4, rtol=1e-4)


def test_interrupted_tuning_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_variant(source, "pre-norm", seed=1)
    text, whole, parts = text_file(tmp_path), tmp_path / "whole", tmp_path / "parts"
    options = TuningOptions(steps=8, tokens_per_step=128, length=64, lr=0.01, save_minutes=0)
    add_exits(source, whole, texts=[text], options=options, state=tmp_path / "state-whole")

    def interrupt(now: Progress) -> None:
        if now.stage == "tuning" and now.step == 5:
            raise KeyboardInterrupt

    state = tmp_path / "state-parts"
    with pytest.raises(KeyboardInterrupt):
        add_exits(source, parts, texts=[text], options=options, state=state, progress=interrupt)
    assert not parts.exists()
    add_exits(source, parts, texts=[text], options=options, state=state)
    for name, tensor in load_file(whole / "exits.safetensors").items():
        torch.testing.assert_close(load_file(parts / "exits.safetensors")[name], tensor, atol=0, rtol=0)
    assert len((state / "log.jsonl").read_text().splitlines()) == 8


def test_an_interrupted_reading_goes_on_without_reading_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_variant(source, "llama", seed=1)
    text, whole, parts = text_file(tmp_path), tmp_path / "whole", tmp_path / "parts"
    options = TuningOptions(steps=8, tokens_per_step=512, length=64, lr=0.01)
    add_exits(source, whole, texts=[text], options=options, state=tmp_path / "state-whole")
    reads: list[int] = []

    def interrupt(now: Progress) -> None:
        reads.append(now.step)
        if len(reads) == 20:
            raise KeyboardInterrupt

    state = tmp_path / "state-parts"
    with pytest.raises(KeyboardInterrupt):
        add_exits(source, parts, texts=[text], options=options, state=state, progress=interrupt)
    reads.clear()
    with pytest.raises(KeyboardInterrupt):
        add_exits(source, parts, texts=[text], options=options, state=state, progress=interrupt)
    assert reads[0] > 8 * 64  # the first eight pieces at least are kept
    add_exits(source, parts, texts=[text], options=options, state=state)
    for name, tensor in load_file(whole / "exits.safetensors").items():
        torch.testing.assert_close(load_file(parts / "exits.safetensors")[name], tensor, atol=0, rtol=0)


def test_states_of_another_text_are_refused(tmp_path: Path) -> None:
    source, text, other = tmp_path / "source", text_file(tmp_path), tmp_path / "other.txt"
    save_variant(source, "llama", seed=1)
    other.write_text("The quick brown fox jumps over the lazy dog. " * 80)

    def interrupt(now: Progress) -> None:
        if now.stage == "tuning":
            raise KeyboardInterrupt

    state, target = tmp_path / "state", tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        add_exits(source, target, texts=[text], options=OPTIONS, state=state, progress=interrupt)
    with pytest.raises(CheckpointError, match="is of another run"):
        add_exits(source, target, texts=[other], options=OPTIONS, state=state)


def test_every_text_gives_the_same_share_and_its_end_is_held_out(tmp_path: Path) -> None:
    source, long, lines = tmp_path / "source", text_file(tmp_path), tmp_path / "lines.jsonl"
    save_variant(source, "llama", seed=1)
    tokenizer = load_tokenizer(source, EarlyExitFacts((6,), "shared", 6)).tokenizer
    documents = [f"document {number} of a file with lines" for number in range(20)]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    whole, parted = read_passages([long, lines], length=64)
    assert (whole.name, parted.name) == ("text", "lines")
    assert [passage.text for passage in parted.held] == documents[-2:]
    assert "".join(passage.text for passage in (*whole.tuning, *whole.held)) == long.read_text()
    chosen = _chosen_pieces([whole, parted], tokenizer, 64, tokens=600, seed=0)
    assert all(piece[0] == 2 and len(piece) <= 65 for piece in chosen)
    shares = [0, 0]
    for piece in chosen:
        shares["document" in tokenizer.decode(piece.tolist())] += len(piece) - 1
    assert 600 <= sum(shares) <= 600 + 256
    assert abs(shares[0] - shares[1]) <= 256


def test_of_a_conversation_only_the_answer_is_measured(tmp_path: Path) -> None:
    source, lines = tmp_path / "source", tmp_path / "lines.jsonl"
    save_variant(source, "llama", seed=1)
    tokenizer = load_tokenizer(source, EarlyExitFacts((6,), "shared", 6)).tokenizer
    line = json.dumps({"prompt": "what is said of a word?\n", "text": "it was in the beginning"})
    lines.write_text(f"{line}\n" * 4)
    (passages,) = read_passages([lines], length=64)
    (piece,) = pieces(tokenizer, passages.held[0], length=64)
    assert tokenizer.decode(piece.ids[piece.first :].tolist()) == "it was in the beginning"
    reader = ExitReader(source, (2, 6), "shared")
    measured, whole = reader.facts([piece]), reader.facts([(piece.ids, 1)])
    count = len(piece.ids) - piece.first
    assert len(measured[6].top) == count
    torch.testing.assert_close(measured[2].log_probability, whole[2].log_probability[-count:])


def test_exits_alone_name_the_weights_that_they_are_for(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save_variant(source, "tied", seed=1)
    add_exits(
        source,
        target,
        texts=[text_file(tmp_path)],
        options=OPTIONS,
        state=tmp_path / "state",
        exits_only=True,
    )
    assert {path.name for path in target.iterdir()} == {"README.md", "exits.safetensors", "helios.json"}
    facts = EarlyExitFacts.read(target, 6)
    assert facts.weights_digest == weights_digest(source)
    assert "exits.2.norm.bias" not in load_file(target / "exits.safetensors")
    assert f"Default depth: {facts.default_depth}" in (target / "README.md").read_text()


def test_shared_exits_need_no_tuning(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save_variant(source, "pre-norm", seed=1)
    add_exits(
        source, target, head="shared", texts=[text_file(tmp_path)], options=OPTIONS, state=tmp_path / "state"
    )
    entry = read_model(target)
    assert entry.exit_layers == (2, 3, 4, 6)
    assert not (target / "exits.safetensors").exists()
    assert (
        json.loads((target / "helios.json").read_text())["training"]["own_evaluation"]["6"]["perplexity"] > 1
    )


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
    with pytest.raises(InvalidRequestError, match="tuning needs more"):
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
