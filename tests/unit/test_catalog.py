"""Promises of the catalog about models directories, without torch and without reading weights."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helios import catalog
from helios.architectures.registry import read_config
from helios.catalog import EarlyExitFacts
from helios.errors import CheckpointError, SettingsError, UnknownDepthError, UnknownModelError
from helios.weight_map import WeightMap
from tests.opt_variants import FORMS, VARIANTS, Form, save_variant

FACTS: dict[str, Any] = {
    "format_version": 1,
    "exit_layers": [2, 4, 6],
    "exit_head": "shared",
    "thresholds": {"2": 0.5, "4": 0.25},
    "tokenizer_id": "0" * 64,
    "default_depth": 4,
    "training": {"recipe": "joint"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    save_variant(path, "pre-norm", 1, exits=(2, 4, 6), thresholds={2: 0.5})
    return path


def rewrite(file: Path, **changes: object) -> None:
    """Changes fields of a JSON file. A field set to `...` is removed."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


def test_lists_models_with_their_facts(model: Path) -> None:
    save_variant(model.parent / "plain", "no-bias", 2, "sharded-bin")
    plain, tiny = catalog.list_models(model.parent)
    assert (tiny.name, tiny.path, tiny.num_layers) == ("tiny", model, 6)
    assert (tiny.exit_layers, tiny.default_depth, tiny.has_exits) == ((2, 4, 6), 2, True)
    assert (tiny.vocab_size, tiny.context_tokens) == (264, 256)
    assert tiny.facts.thresholds == {2: 0.5}
    assert tiny.tokenizer_id == hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    assert (plain.name, plain.exit_layers, plain.default_depth, plain.has_exits) == ("plain", (6,), 6, False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_transformers_counts(tmp_path: Path, variant: str) -> None:
    model = save_variant(tmp_path / variant, variant, 1)
    assert catalog.read_model(tmp_path / variant).parameters == model.num_parameters()


@pytest.mark.parametrize("form", FORMS)
def test_no_weight_is_read_to_list_a_model(tmp_path: Path, form: Form) -> None:
    save_variant(tmp_path / "tiny", "pre-norm", 1, form)
    for file in WeightMap.read(tmp_path / "tiny").files:
        file.write_bytes(b"")
    assert [entry.name for entry in catalog.list_models(tmp_path)] == ["tiny"]


def test_catalog_needs_no_torch(model: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from helios import catalog; from helios.sources import pull;"
        "assert catalog.list_models(Path(sys.argv[1]));"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(model.parent)], check=True)


def test_broken_directories_are_listed_with_the_reason_beside_the_good_ones(model: Path) -> None:
    models = model.parent
    (models / "README.md").write_text("no model")
    (models / ".pulling").mkdir()
    (models / "empty").mkdir()
    save_variant(models / "bare", "pre-norm", 1)
    (models / "bare" / "model.safetensors").unlink()
    save_variant(models / "mute", "pre-norm", 1)
    (models / "mute" / "tokenizer.json").unlink()
    save_variant(models / "headless", "pre-norm", 1, exits=(2, 6), head="norm")
    (models / "headless" / "exits.safetensors").unlink()
    found = catalog.read_catalog(models)
    assert [entry.name for entry in found.models] == ["tiny"]
    reasons = {broken.name: broken.reason for broken in found.broken}
    assert reasons.keys() == {"bare", "empty", "headless", "mute"}
    assert "empty/config.json is missing" in reasons["empty"]
    assert "holds no weights" in reasons["bare"]
    assert "holds no tokenizer" in reasons["mute"]
    assert "exits.safetensors is missing" in reasons["headless"]
    with pytest.raises(CheckpointError, match="holds no weights"):
        catalog.find_model(models, "bare")


def test_unknown_model_names_the_available_ones(model: Path) -> None:
    assert catalog.find_model(model.parent, "tiny").path == model
    with pytest.raises(UnknownModelError, match=r"'big'.*available: tiny"):
        catalog.find_model(model.parent, "big")


@pytest.mark.parametrize("name", ["../secret/tiny", "/", "..", ".", "", "tiny/", "tiny/../tiny"])
def test_a_name_never_reaches_outside_the_directory(model: Path, name: str) -> None:
    save_variant(model.parent / "secret" / "tiny", "pre-norm", 1)
    (model.parent / "models").mkdir()
    with pytest.raises(UnknownModelError):
        catalog.find_model(model.parent / "models", name)
    with pytest.raises(UnknownModelError):
        catalog.find_model(model.parent, name)


def test_missing_models_directory_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOS_MODELS_DIR", str(tmp_path / "gone"))
    with pytest.raises(SettingsError, match=r"gone.*HELIOS_MODELS_DIR"):
        catalog.find_models_dir()
    with pytest.raises(SettingsError, match="--models-dir"):
        catalog.list_models(tmp_path / "gone")


def test_models_directory_is_the_argument_then_the_environment_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models", "from-environment", "from-argument"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HELIOS_MODELS_DIR", raising=False)
    assert catalog.find_models_dir() == tmp_path / "models"
    monkeypatch.setenv("HELIOS_MODELS_DIR", str(tmp_path / "from-environment"))
    assert catalog.find_models_dir() == tmp_path / "from-environment"
    assert catalog.find_models_dir(tmp_path / "from-argument") == tmp_path / "from-argument"


def test_facts_are_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "helios.json").write_text(json.dumps(FACTS))
    facts = EarlyExitFacts.read(tmp_path, 6)
    assert facts == EarlyExitFacts(
        exit_layers=(2, 4, 6),
        exit_head="shared",
        default_depth=4,
        thresholds={2: 0.5, 4: 0.25},
        tokenizer_id="0" * 64,
        training={"recipe": "joint"},
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", 2),
        ("precisions", {"int8": {"first": {}}}),
        ("precisions", {"int8": {"1": {"agreement": 1}}}),
        ("precisions", []),
        ("format_version", ...),
        ("exit_layers", []),
        ("exit_layers", [2, 4]),
        ("exit_layers", [2, 4, 6, 8]),
        ("exit_layers", [4, 2, 6]),
        ("exit_layers", [2, 2, 6]),
        ("exit_layers", [0, 6]),
        ("exit_layers", [True, 6]),
        ("exit_layers", ["2", 6]),
        ("exit_layers", "6"),
        ("exit_head", "mlp"),
        ("default_depth", 3),
        ("default_depth", "4"),
        ("thresholds", {"3": 0.5}),
        ("thresholds", {"2": 1.5}),
        ("thresholds", {"2": float("nan")}),
        ("thresholds", {"2": "high"}),
        ("thresholds", [0.5]),
        ("tokenizer_id", 7),
        ("training", "joint"),
    ],
)
def test_wrong_facts_name_file_and_field(tmp_path: Path, field: str, value: object) -> None:
    file = tmp_path / "helios.json"
    file.write_text(json.dumps(FACTS))
    rewrite(file, **{field: value})
    with pytest.raises(CheckpointError, match=rf"helios\.json: {field} "):
        EarlyExitFacts.read(tmp_path, 6)


def test_depth_without_an_exit_names_the_valid_ones(tmp_path: Path) -> None:
    facts = EarlyExitFacts((2, 4, 6), "shared", 4)
    facts.check_depth(4, "tiny")
    with pytest.raises(UnknownDepthError, match="tiny has no exit after layer 3; its depths are 2, 4, 6"):
        facts.check_depth(3, "tiny")
    with pytest.raises(UnknownDepthError, match="only depth is 6, not 3; add exits"):
        EarlyExitFacts.read(tmp_path, 6).check_depth(3, "plain")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("model_type", ...),
        ("hidden_size", ...),
        ("hidden_size", 0),
        ("num_hidden_layers", "12"),
        ("num_attention_heads", 5),
        ("vocab_size", -1),
        ("ffn_dim", None),
        ("max_position_embeddings", 2.5),
        ("word_embed_proj_dim", "wide"),
        ("activation_function", "swish"),
        ("activation_function", ["relu"]),
        ("do_layer_norm_before", "yes"),
        ("enable_bias", None),
        ("eos_token_id", 264),
        ("pad_token_id", -1),
        ("bos_token_id", "</s>"),
        ("dtype", "int8"),
    ],
)
def test_wrong_config_names_file_and_field(model: Path, field: str, value: object) -> None:
    rewrite(model / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} "):
        read_config(model)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_unreadable_config_is_named(model: Path, content: bytes, name: str) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"/{name}"):
        read_config(model)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (2, None, (2,)),
        ([2, 50], None, (2, 50)),
        (None, None, ()),
        (2, {"eos_token_id": [7, 50]}, (7, 50)),
        ([2, 50], {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": 7}, (7,)),
        # generation_config.json names none, but text must end all the same.
        ([2, 50], {"eos_token_id": None}, (2, 50)),
        ([2, 50], {"max_length": 20}, (2, 50)),
    ],
)
def test_ends_of_text_are_those_of_the_generation_config_or_else_of_the_config(
    model: Path, config: object, generation: object, ends: tuple[int, ...]
) -> None:
    rewrite(model / "config.json", eos_token_id=config)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(model).eos_token_ids == ends
    assert catalog.read_model(model).config.eos_token_ids == ends


@pytest.mark.parametrize("ends", [264, -1, "</s>", True, [2, 264], [2, "</s>"], [[2]], {"id": 2}, 2.0])
def test_wrong_ends_of_text_name_file_and_field(model: Path, ends: object) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"/generation_config\.json: eos_token_id must be an id"):
        read_config(model)
    assert "eos_token_id" in catalog.read_catalog(model.parent).broken[0].reason


def test_config_as_older_hub_checkpoints_write_it(model: Path) -> None:
    absent = (
        "enable_bias",
        "layer_norm_elementwise_affine",
        "_remove_final_layer_norm",
        "tie_word_embeddings",
    )
    rewrite(model / "config.json", dtype=..., torch_dtype="float16", **dict.fromkeys(absent, ...))
    config = read_config(model)
    assert config.dtype == "float16"
    assert config.qkv_bias and config.out_bias and config.ffn_bias
    assert config.norm_affine and config.has_final_norm and config.tied_head
    assert config.eos_token_ids == (2,)
    rewrite(model / "config.json", eos_token_id=[2, 50], word_embed_proj_dim=None)
    config = read_config(model)
    assert config.eos_token_ids == (2, 50)
    assert config.embed_size == config.hidden_size and not config.is_projected


def test_an_index_cannot_name_files_outside_the_checkpoint(tmp_path: Path) -> None:
    index = {"weight_map": {"model.decoder.embed_tokens.weight": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        WeightMap.read(tmp_path)
