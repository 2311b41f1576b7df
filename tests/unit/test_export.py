"""An exported checkpoint is a complete model that gives the same results as the partial model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from helios import catalog
from helios.engine.weights.export import export
from helios.engine.weights.part_reader import load_weights
from helios.errors import CheckpointError, UnknownDepthError
from tests.opt_variants import FORMS, Form, Head, truncated
from tests.variants import LLAMA_VARIANTS, TYPICAL, VARIANTS, save_variant

EXITS = (2, 4, 6)
TOKENS = torch.tensor([[2, 50, 60, 7, 199, 263, 4]])


def assert_same_logits(path: Path, reference: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """transformers reads `path` without missing or unknown tensors, and its logits equal `reference`'s."""
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits, expected = model.eval().float()(TOKENS).logits, reference(TOKENS).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(logits, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shared_exit_becomes_the_last_layer(tmp_path: Path, variant: str) -> None:
    model = save_variant(tmp_path / "source", variant, 3, exits=EXITS)
    for depth in EXITS:
        target = export(tmp_path / "source", tmp_path / f"depth-{depth}", depth)
        assert_same_logits(target, truncated(model, depth))


@pytest.mark.parametrize("head", ["norm", "linear"])
@pytest.mark.parametrize(
    "variant", ["pre-norm", "projected", "no-bias", "untied", "no-final-norm", "gelu", *LLAMA_VARIANTS]
)
def test_an_exits_own_head_is_folded_in(tmp_path: Path, variant: str, head: Head) -> None:
    source = tmp_path / "source"
    model = save_variant(source, variant, 3, exits=EXITS, head=head)
    for depth in EXITS:
        target = export(source, tmp_path / f"depth-{depth}", depth)
        assert_same_logits(target, truncated(model, depth, source))
        assert not (target / "exits.safetensors").exists()


def test_a_linear_of_an_exit_unties_the_head(tmp_path: Path) -> None:
    save_variant(tmp_path / "source", "tied", 3, exits=EXITS, head="linear")
    for depth, is_tied in ((4, False), (6, True)):
        target = export(tmp_path / "source", tmp_path / f"depth-{depth}", depth)
        assert catalog.read_model(target).config.tied_head == is_tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", TYPICAL)
def test_weights_keep_their_type(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    source = tmp_path / "source"
    model = save_variant(source, variant, 3, exits=EXITS, head="linear", dtype=dtype)
    target = export(source, tmp_path / "target", 4)
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {dtype}
    assert_same_logits(target, truncated(model, 4, source), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_every_file_form_is_exported(tmp_path: Path, form: Form) -> None:
    model = save_variant(tmp_path / "source", "post-norm", 3, form, EXITS)
    assert_same_logits(export(tmp_path / "source", tmp_path / "target", 2), truncated(model, 2))


def test_the_export_is_a_model_of_the_catalog_with_its_tokenizer(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save_variant(source, "pre-norm", 3, exits=EXITS, head="norm")
    told: list[tuple[int, int]] = []
    export(source, target, 4, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    entry = catalog.find_model(tmp_path, "target")
    assert (entry.num_layers, entry.exit_layers) == (4, (4,))
    assert entry.tokenizer_id == catalog.read_model(source).tokenizer_id
    assert AutoTokenizer.from_pretrained(target)("a")["input_ids"][0] == 2
    weights = load_weights(target, entry.config, entry.facts, 4, torch.float32)
    heads = load_file(source / "exits.safetensors")
    assert weights.final_norm is not None
    assert torch.equal(weights.final_norm.weight, heads["exits.4.norm.weight"])
    assert weights.lm_head is weights.embed_tokens
    # All files have the same mode, so another user's engine can read them all.
    assert len({file.stat().st_mode for file in target.iterdir()}) == 1


def test_the_export_ends_its_texts_as_the_model_does(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_variant(source, "pre-norm", 3, exits=EXITS, eos_token_id=[2, 9])
    for ends in ([2, 9], [7, 50]):
        if ends != [2, 9]:
            (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        target = export(source, tmp_path / "target", 4, force=True)
        assert catalog.read_model(target).config.eos_token_ids == tuple(ends)
        assert AutoModelForCausalLM.from_pretrained(target).generation_config.eos_token_id == ends


@pytest.mark.parametrize("variant", ["post-norm", "no-affine"])
def test_a_norm_that_opt_has_no_place_for_is_refused(tmp_path: Path, variant: str) -> None:
    source = tmp_path / "source"
    model = save_variant(source, variant, 3, exits=EXITS, head="norm")
    with pytest.raises(CheckpointError, match=r"helios\.json: exit 2 has a norm of its own"):
        export(source, tmp_path / "target", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert_same_logits(export(source, tmp_path / "whole", 6), model)


def test_nothing_is_written_for_a_depth_without_an_exit(tmp_path: Path) -> None:
    save_variant(tmp_path / "source", "pre-norm", 3, exits=EXITS)
    with pytest.raises(UnknownDepthError, match="2, 4, 6"):
        export(tmp_path / "source", tmp_path / "target", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_target_is_replaced_only_when_forced(tmp_path: Path) -> None:
    model = save_variant(tmp_path / "source", "pre-norm", 3, exits=EXITS)
    target = tmp_path / "target"
    export(tmp_path / "source", target, 2)
    (target / "stray").touch()
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="target exists; choose another"):
        export(tmp_path / "source", target, 4)
    assert (target / "model.safetensors").read_bytes() == before
    export(tmp_path / "source", target, 4, force=True)
    assert_same_logits(target, truncated(model, 4))
    assert not (target / "stray").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_corrupt_source_leaves_an_existing_target_as_it_was(tmp_path: Path) -> None:
    model = save_variant(tmp_path / "source", "pre-norm", 3, "sharded-safetensors", EXITS)
    target = export(tmp_path / "source", tmp_path / "target", 4)
    index = json.loads((tmp_path / "source" / "model.safetensors.index.json").read_text())
    shard = tmp_path / "source" / next(iter(index["weight_map"].values()))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated"):
        export(tmp_path / "source", target, 2, force=True)
    assert_same_logits(target, truncated(model, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
