"""Promises of loading a checkpoint: the right tensors, no byte more, and errors that name the file."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from helios import catalog
from helios.architectures.architecture import TensorNames
from helios.architectures.opt import OPT
from helios.architectures.registry import architecture_of, read_config
from helios.engine.tokenizer import load_tokenizer
from helios.engine.weights.checkpoint import Checkpoint
from helios.engine.weights.part_reader import load_weights
from helios.engine.weights.parts import ModelWeights
from helios.errors import CheckpointError, UnknownDepthError
from helios.weight_map import WeightMap
from tests.opt_variants import FORMS, Form, byte_tokenizer, save_tensors
from tests.variants import VARIANTS, save_variant

EXITS = (2, 4, 6)
PREFIX = "model.decoder."


def load(path: Path, depth: int, dtype: torch.dtype = torch.float32, **options: object) -> ModelWeights:
    """The partial model of a checkpoint directory."""
    entry = catalog.read_model(path)
    return load_weights(path, entry.config, entry.facts, depth, dtype, **options)


def named(weights: ModelWeights, names: TensorNames = OPT.names) -> dict[str, torch.Tensor]:
    """Every loaded tensor under the name that transformers' language model gives it."""
    parts = {
        names.project_in: weights.project_in,
        names.project_out: weights.project_out,
        names.final_norm: weights.final_norm,
    }
    for index, layer in enumerate(weights.layers):
        for field in dataclasses.fields(layer):
            parts[getattr(names, field.name).format(index)] = getattr(layer, field.name)
    prefix = names.prefixes[0]
    tensors = {
        f"{prefix}{name}.{kind}": getattr(part, kind)
        for name, part in parts.items()
        for kind in ("weight", "bias")
        if getattr(part, kind, None) is not None
    }
    if weights.embed_positions is not None:
        tensors[f"{prefix}{names.embed_positions}.weight"] = weights.embed_positions
    return tensors | {
        f"{prefix}{names.embed_tokens}.weight": weights.embed_tokens,
        f"{names.lm_head}.weight": weights.lm_head,
    }


def needed(model: PreTrainedModel, depth: int) -> dict[str, torch.Tensor]:
    """The tensors of transformers' model that its first `depth` layers need."""
    layer_of = {key: re.search(r"layers\.(\d+)\.", key) for key in model.state_dict()}
    return {
        key: tensor
        for key, tensor in model.state_dict().items()
        if (layer := layer_of[key]) is None or int(layer[1]) < depth
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_tensors_of_a_depth_are_loaded(tmp_path: Path, variant: str, form: Form) -> None:
    model = save_variant(tmp_path, variant, 1, form, EXITS)
    for depth in EXITS:
        weights = load(tmp_path, depth)
        names = architecture_of(catalog.read_model(tmp_path).config).names
        tensors, expected = named(weights, names), needed(model, depth)
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[key]), key
        tied = model.config.tie_word_embeddings
        assert (weights.lm_head is weights.embed_tokens) == tied
        if form != "legacy-bin":
            counted = [key for key in expected if key != "lm_head.weight" or not tied]
            assert weights.bytes_read == sum(expected[key].nbytes for key in counted)


@pytest.mark.parametrize("form", FORMS)
def test_exports_of_the_bare_model_are_read_too(tmp_path: Path, form: Form) -> None:
    model = save_variant(tmp_path, "post-norm", 1, form, prefix="decoder.")
    tensors = named(load(tmp_path, 6))
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in needed(model, 6).items())


def test_a_pickle_of_the_old_format_counts_as_read_whole(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, "legacy-bin", EXITS)
    assert load(tmp_path, 2).bytes_read == (tmp_path / "pytorch_model.bin").stat().st_size


@pytest.mark.parametrize("form", ["sharded-safetensors", "sharded-bin"])
def test_shards_without_needed_tensors_are_not_opened(tmp_path: Path, form: Form) -> None:
    model = save_variant(tmp_path, "pre-norm", 1, form, EXITS)
    file_of = WeightMap.read(tmp_path).file_of
    assert file_of is not None
    wanted = {file_of[key] for key in needed(model, 2) if key in file_of}
    spare = set(file_of.values()) - wanted
    assert spare
    for file in spare:
        file.write_bytes(b"not weights")
    assert len(load(tmp_path, 2).layers) == 2
    with pytest.raises(CheckpointError, match=min(spare).name):
        load(tmp_path, 6)


@pytest.mark.parametrize("head", ["shared", "norm", "linear"])
@pytest.mark.parametrize("variant", ["pre-norm", "post-norm", "no-affine"])
def test_only_the_heads_of_the_asked_exits_are_read(tmp_path: Path, variant: str, head: str) -> None:
    save_variant(tmp_path, variant, 1, "bin", EXITS, head)
    stored = load_file(tmp_path / "exits.safetensors") if head != "shared" else {}
    own_norm = variant != "post-norm"
    for exits, depth in [((4,), 4), ((2, 4), 4), ((2, 4, 6), 6), ((6,), 6)]:
        weights = load(tmp_path, depth, exits=exits)
        early = [layer for layer in exits if layer != 6 and head != "shared"]
        assert list(weights.exits) == early
        assert (weights.final_norm is not None) == (own_norm and len(early) < len(exits))
        for layer, loaded in weights.exits.items():
            assert torch.equal(loaded.norm.weight, stored[f"exits.{layer}.norm.weight"])
            assert torch.equal(loaded.norm.bias, stored[f"exits.{layer}.norm.bias"])
            if head == "linear":
                assert torch.equal(loaded.linear.weight, stored[f"exits.{layer}.linear.weight"])
            else:
                assert loaded.linear is None
        plain = sum(tensor.nbytes for key, tensor in named(weights).items() if key != "lm_head.weight")
        heads = sum(tensor.nbytes for key, tensor in stored.items() if int(key.split(".")[1]) in early)
        assert weights.bytes_read == plain + heads


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_converted_to_the_asked_type(tmp_path: Path, form: Form, stored: torch.dtype) -> None:
    # The vocabulary is larger than the read buffer and not a multiple of it.
    model = save_variant(tmp_path, "pre-norm", 1, form, dtype=stored, vocab_size=70_001)
    for dtype in (torch.float32, torch.bfloat16):
        weights = load(tmp_path, 6, dtype)
        assert weights.embed_tokens.nbytes > 4 << 20
        for key, tensor in named(weights).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, model.state_dict()[key].to(dtype)), key
    assert weights.bytes_read == model.num_parameters() * stored.itemsize


@pytest.mark.parametrize("form", FORMS)
def test_a_head_stored_beside_the_embedding_is_tied_only_when_equal(tmp_path: Path, form: Form) -> None:
    model = save_variant(tmp_path, "pre-norm", 1, form)
    tensors = dict(model.state_dict())
    for file in WeightMap.read(tmp_path).files:
        file.unlink()
    # torch.save stores tied weights like this: two names for one storage.
    if form in ("bin", "legacy-bin"):
        save_tensors(tmp_path, tensors, form)
        weights = load(tmp_path, 6)
        assert weights.lm_head is weights.embed_tokens
        if form == "bin":
            assert weights.bytes_read == model.num_parameters() * 4
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    save_tensors(tmp_path, tensors, form)
    weights = load(tmp_path, 6)
    assert weights.lm_head is weights.embed_tokens
    tensors["lm_head.weight"][7, 7] += 1
    save_tensors(tmp_path, tensors, form)
    assert torch.equal(load(tmp_path, 6).lm_head, tensors["lm_head.weight"])


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", ""])
@pytest.mark.parametrize("form", FORMS)
def test_tied_weights_may_be_stored_under_the_heads_name_alone(
    tmp_path: Path, form: Form, prefix: str
) -> None:
    model = save_variant(tmp_path, "projected", 1, form, prefix=prefix, tied_as="lm_head")
    weights = load(tmp_path, 6)
    assert weights.lm_head is weights.embed_tokens
    assert all(torch.equal(tensor, named(weights)[key]) for key, tensor in needed(model, 6).items())
    if form != "legacy-bin":
        assert weights.bytes_read == model.num_parameters() * 4


@pytest.mark.parametrize("tied_as", ["embed_tokens", "lm_head"])
def test_without_tying_neither_name_stands_for_the_other(tmp_path: Path, tied_as: str) -> None:
    save_variant(tmp_path, "pre-norm", 1, tied_as=tied_as)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    missing = "lm_head" if tied_as == "embed_tokens" else "embed_tokens"
    with pytest.raises(CheckpointError, match=rf"no tensor {missing}\.weight"):
        load(tmp_path, 6)


def test_progress_is_told_after_each_layer(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS)
    told: list[tuple[int, int]] = []
    load(tmp_path, 4, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_depths_without_an_exit_are_refused_naming_the_valid_ones(tmp_path: Path) -> None:
    save_variant(tmp_path / "exits", "pre-norm", 1, exits=EXITS)
    save_variant(tmp_path / "plain", "pre-norm", 1)
    with pytest.raises(UnknownDepthError, match="depths are 2, 4, 6"):
        load(tmp_path / "exits", 3)
    with pytest.raises(UnknownDepthError, match="depths are 2, 4, 6"):
        load(tmp_path / "exits", 6, exits=(3, 6))
    with pytest.raises(UnknownDepthError, match="plain has no early exits"):
        load(tmp_path / "plain", 2)
    assert len(load(tmp_path / "plain", 6).layers) == 6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", ["truncated", "head cut", "emptied", "garbage"])
def test_a_damaged_weight_file_is_named(tmp_path: Path, form: Form, damage: str) -> None:
    save_variant(tmp_path, "pre-norm", 1, form)
    file = WeightMap.read(tmp_path).files[-1]
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[: len(content) * 2 // 3],
            "head cut": content[5:],
            "emptied": b"",
            "garbage": bytes(range(256)) * 64,
        }[damage]
    )
    with pytest.raises(CheckpointError, match=file.name):
        load(tmp_path, 6)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_weight_file_is_named(tmp_path: Path, form: Form) -> None:
    save_variant(tmp_path, "pre-norm", 1, form)
    config = read_config(tmp_path)
    facts = catalog.EarlyExitFacts.read(tmp_path, 6)
    file = WeightMap.read(tmp_path).files[-1]
    file.unlink()
    expected = file.name if "sharded" in form else r"model\.safetensors, pytorch_model\.bin"
    with pytest.raises(CheckpointError, match=expected):
        load_weights(tmp_path, config, facts, 6, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_tensor_names_file_and_tensor(tmp_path: Path, form: Form) -> None:
    model = save_variant(tmp_path, "pre-norm", 1, form)
    for file in WeightMap.read(tmp_path).files:
        file.unlink()
    missing = f"{PREFIX}layers.3.fc1.bias"
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items() if key != missing}
    save_tensors(tmp_path, tensors, form)
    with pytest.raises(CheckpointError, match=r"layers\.3\.fc1\.bias.*model.*(safetensors|bin)"):
        load(tmp_path, 6)


def test_an_index_that_names_the_wrong_shard_is_caught(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, "sharded-safetensors")
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    name = f"{PREFIX}layers.5.fc2.weight"
    other = next(file for file in fields["weight_map"].values() if file != fields["weight_map"][name])
    fields["weight_map"][name] = other
    index.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"{other} lacks {name}"):
        load(tmp_path, 6)


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_of_another_shape_names_file_tensor_and_both_shapes(tmp_path: Path, form: Form) -> None:
    save_variant(tmp_path, "pre-norm", 1, form)
    config = json.loads((tmp_path / "config.json").read_text()) | {"ffn_dim": 65}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model.*layers\.0\.fc1\.weight.*\[64, 32\].*\[65, 32\]"):
        load(tmp_path, 6)


@pytest.mark.parametrize(
    ("variant", "changed", "problem"),
    [
        ("llama", {"num_key_value_heads": 3}, r"k_proj\.weight has shape \[16, 48\] .* \[24, 48\]"),
        ("llama", {"head_dim": 4}, r"q_proj\.weight has shape \[48, 48\] .* \[24, 48\]"),
        ("llama", {"intermediate_size": 96}, r"(gate|up)_proj\.weight has shape \[80, 48\] .* \[96, 48\]"),
        ("llama", {"vocab_size": 265}, r"\.weight has shape \[264, 48\] .* \[265, 48\]"),
        ("llama", {"num_hidden_layers": 7}, r"no tensor layers\.6\.input_layernorm\.weight"),
        ("llama", {"attention_bias": True}, r"no tensor layers\.0\.self_attn\.q_proj\.bias"),
        ("llama", {"mlp_bias": True}, r"no tensor layers\.0\.mlp\.(gate|up)_proj\.bias"),
        ("llama", {"model_type": "qwen3"}, r"no tensor layers\.0\.self_attn\.q_norm\.weight"),
        ("tied", {"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
        ("biased", {"attention_bias": False}, r"self_attn\.q_proj\.bias is there though config\.json"),
        ("biased", {"mlp_bias": False}, r"mlp\.(gate|up)_proj\.bias is there though config\.json"),
        ("qwen2", {"model_type": "llama"}, r"self_attn\.q_proj\.bias is there though config\.json"),
    ],
)
def test_a_config_that_is_not_of_its_weights_is_refused_naming_the_tensor(
    tmp_path: Path, variant: str, changed: dict[str, object], problem: str
) -> None:
    save_variant(tmp_path, variant, 1)
    config = json.loads((tmp_path / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=problem):
        load(tmp_path, config["num_hidden_layers"])


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_quantised_weights_are_refused(tmp_path: Path, form: Form) -> None:
    model = save_variant(tmp_path, "pre-norm", 1)
    (tmp_path / "model.safetensors").unlink()
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors[f"{PREFIX}layers.0.fc1.weight"] = torch.zeros(64, 32, dtype=torch.int8)
    save_tensors(tmp_path, tensors, form)
    with pytest.raises(CheckpointError, match=r"fc1\.weight is stored as .*(I8|int8)"):
        load(tmp_path, 6)


def test_a_missing_or_incomplete_heads_file_is_named(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS, head="linear")
    entry = catalog.read_model(tmp_path)
    file = tmp_path / "exits.safetensors"
    heads = load_file(file)
    del heads["exits.4.linear.weight"]
    save_file(heads, file)
    assert load(tmp_path, 2).exits.keys() == {2}
    with pytest.raises(CheckpointError, match=r"exits\.4\.linear\.weight.*exits\.safetensors"):
        load(tmp_path, 4)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"exits\.safetensors is missing"):
        load_weights(tmp_path, entry.config, entry.facts, 4, torch.float32)
    assert load_weights(tmp_path, entry.config, entry.facts, 6, torch.float32).exits == {}


class RunsCode:
    """Creates a file if it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mknod, (str(self.file),)


@pytest.mark.parametrize("form", ["bin", "legacy-bin", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, form: str) -> None:
    save_variant(tmp_path, "pre-norm", 1)
    (tmp_path / "model.safetensors").unlink()
    file, proof = tmp_path / "pytorch_model.bin", tmp_path / "proof"
    content = {f"{PREFIX}embed_tokens.weight": RunsCode(proof)}
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*Get the model as safetensors"):
        load(tmp_path, 6)
    assert not proof.exists()


def test_a_pickle_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin does not map names to tensors"):
        load(tmp_path, 6)


@pytest.mark.parametrize("form", FORMS)
def test_loaded_tensors_live_on_without_the_file(tmp_path: Path, form: Form) -> None:
    model = save_variant(tmp_path, "pre-norm", 1, form)
    weights = load(tmp_path, 6)
    for file in WeightMap.read(tmp_path).files:
        # The file is overwritten in place, so a live mapping would see the change.
        file.write_bytes(b"\xff" * file.stat().st_size)
    for key, tensor in named(weights).items():
        assert torch.equal(tensor, model.state_dict()[key])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1)
    with Checkpoint(tmp_path, OPT.names.prefixes) as checkpoint:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"model\.safetensors ends inside .*embed_tokens\.weight"):
            checkpoint.tensor("embed_tokens.weight", (264, 32), torch.float32)


# Loads each "path depth" of its input in a separate child and prints how much memory that added.
MEASURE = """
import os, sys
from pathlib import Path
import torch
from helios import catalog
from helios.engine.weights.part_reader import load_weights

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) * 1024

def measure(path, depth):
    entry = catalog.read_model(path)
    # What torch sets up on first use is set up before the measurement.
    torch.equal(torch.empty(1024).copy_(torch.ones(1024, dtype=torch.bfloat16)), torch.ones(1024))
    before = anonymous()
    weights = load_weights(path, entry.config, entry.facts, depth, torch.float32)
    added = anonymous() - before
    maps = Path("/proc/self/maps").read_text()
    print(added, maps.count(str(path)), weights.bytes_read, flush=True)

for line in sys.stdin:
    path, depth = line.split()
    child = os.fork()
    if not child:
        measure(Path(path), int(depth))
        os._exit(0)
    os.waitpid(child, 0)
"""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one load: needed for tensors, added to resident memory, and read from files.

    `mappings`: how many mappings of the checkpoint's files are left.
    """

    needed: int
    anonymous: int
    mappings: int
    read: int


@pytest.fixture(scope="module")
def footprints() -> dict[tuple[Form, int], Footprint]:
    """A model of 106 MB, 12.6 MB in each of its 8 layers, loaded at depth 2 and as a whole."""
    sizes = {"vocab_size": 2048, "hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 8}
    found = {}
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for form in FORMS:
            with tempfile.TemporaryDirectory() as path:
                model = save_variant(Path(path), "pre-norm", 1, form, exits=(2, 8), **sizes)
                for depth in (2, 8):
                    print(path, depth, file=process.stdin, flush=True)
                    figures = map(int, process.stdout.readline().split())
                    size = sum(
                        tensor.nbytes
                        for key, tensor in needed(model, depth).items()
                        if key != "lm_head.weight"
                    )
                    found[form, depth] = Footprint(size, *figures)
        process.stdin.close()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_resident_memory_and_bytes_read_are_those_of_the_loaded_layers(
    footprints: dict[tuple[Form, int], Footprint], form: Form
) -> None:
    slack = 8 << 20  # less than one layer
    for depth in (2, 8):
        footprint = footprints[form, depth]
        print(f"{form} at depth {depth}: {footprint}")  # noqa: T201
        assert abs(footprint.anonymous - footprint.needed) < slack
        assert footprint.mappings == 0
        assert footprint.read == footprint.needed or form == "legacy-bin"


def test_tokenizer_is_read_from_its_file_and_told_by_its_hash(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS)
    entry = catalog.read_model(tmp_path)
    loaded = load_tokenizer(tmp_path, entry.facts)
    assert loaded.tokenizer.encode("hé").ids == byte_tokenizer().encode("hé").ids
    assert loaded.tokenizer_id == entry.tokenizer_id == entry.facts.tokenizer_id
    assert loaded.tokenizer_json == (tmp_path / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_truncates_and_pads_does_so_no_longer(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1)
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, catalog.read_model(tmp_path).facts)
    assert len(loaded.tokenizer.encode("abc").ids) == 4
    assert len(loaded.tokenizer.encode("abcdefghijkl").ids) == 13


def test_another_tokenizer_than_the_model_was_trained_with_is_refused(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the tokenizer"):
        load_tokenizer(tmp_path, catalog.read_model(tmp_path).facts)


def test_a_corrupt_tokenizer_is_named(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1)
    facts = catalog.read_model(tmp_path).facts
    for content in ("", "{", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is corrupt"):
            load_tokenizer(tmp_path, facts)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="holds neither tokenizer"):
        load_tokenizer(tmp_path, facts)


def test_the_hub_form_of_opts_tokenizer_starts_texts_with_the_end_token(tmp_path: Path) -> None:
    save_variant(tmp_path, "pre-norm", 1)
    facts = catalog.read_model(tmp_path).facts
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    # facebook/opt-125m has these.
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(special | {"add_bos_token": True, "add_prefix_space": False}))
    loaded = load_tokenizer(tmp_path, facts)
    for text in ("héllo  wörld", "</s> a", ""):
        ids = loaded.tokenizer.encode(text).ids
        assert ids == byte_tokenizer().encode(text).ids
        assert loaded.tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert load_tokenizer(tmp_path, facts).tokenizer_id == loaded.tokenizer_id
    config.unlink()
    with pytest.raises(CheckpointError, match="bos_token_id is 2; fetch tokenizer_config"):
        load_tokenizer(tmp_path, facts)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        load_tokenizer(tmp_path, facts)
