"""Pulling a model from a folder. A failed pull leaves nothing."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helios import catalog
from helios.chat_template import read_chat_template
from helios.engine import Engine, EngineSettings
from helios.errors import CheckpointError, InvalidRequestError, SettingsError, UnknownModelError
from helios.sources.pull import pull
from helios.weight_map import WeightMap
from tests.gguf_files import random_model, write_gguf
from tests.opt_variants import FORMS, Form, Head, save_tensors, save_variant

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("head", ["shared", "linear"])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_copied_with_everything_that_serving_needs(
    tmp_path: Path, form: Form, head: Head
) -> None:
    source, models = tmp_path / "source", tmp_path / "models"
    save_variant(source, "pre-norm", 1, form, (2, 6), head)
    (source / "README.md").write_text("---\nlicense: mit\n---\nits card")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    copied = names(source)
    for stray in ("modeling_custom.py", "optimizer.pt", "flax_model.msgpack"):
        (source / stray).write_text("raise SystemExit")
    told: list[tuple[str, int, int]] = []
    pulled = pull(str(source), models, progress=lambda *step: told.append(step))
    entry = pulled.entry
    assert (pulled.licence, pulled.size_bytes) == (
        "mit",
        sum((source / name).stat().st_size for name in copied),
    )
    assert (entry.name, entry.path, entry.exit_layers) == ("source", models / "source", (2, 6))
    assert names(entry.path) == copied
    assert all((entry.path / name).read_bytes() == (source / name).read_bytes() for name in copied)
    assert sorted(name for name, _, _ in told) == copied
    sizes = [(source / name).stat().st_size for name, _, _ in told]
    assert [step[1:] for step in told] == [(sum(sizes[: n + 1]), sum(sizes)) for n in range(len(sizes))]
    # The files are copies, because the source may change afterwards.
    assert all((entry.path / name).stat().st_ino != (source / name).stat().st_ino for name in copied)


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1, "bin")
    save_variant(tmp_path / "source", "pre-norm", 1, "safetensors")
    entry = pull(str(tmp_path / "source"), tmp_path / "models", name="renamed").entry
    assert entry.name == "renamed"
    assert "model.safetensors" in names(entry.path)
    assert "pytorch_model.bin" not in names(entry.path)


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_comes_along_unless_it_cannot_render_a_message(tmp_path: Path, file: str) -> None:
    source, models = tmp_path / "source", tmp_path / "models"
    save_variant(source, "pre-norm", 1)

    def write(template: str) -> None:
        (source / file).write_text(template if "jinja" in file else json.dumps({"chat_template": template}))

    for broken, reason in (("{{ tools | length }}", "NoneType"), ("{% if %}", "not a valid template")):
        write(broken)
        with pytest.raises(CheckpointError, match=f"{file}.*{reason}"):
            pull(str(source), models)
        assert not models.exists() or names(models) == []
    write("{{ messages[0].content }}")
    template = read_chat_template(pull(str(source), models).entry.path)
    assert template is not None
    assert template.text == "{{ messages[0].content }}"


def test_a_taken_name_is_replaced_only_when_forced(tmp_path: Path) -> None:
    models = tmp_path / "models"
    save_variant(tmp_path / "source", "pre-norm", 1)
    save_variant(models / "source", "gelu", 2)
    with pytest.raises(CheckpointError, match="source exists; choose another name, or --force"):
        pull(str(tmp_path / "source"), models)
    assert catalog.find_model(models, "source").config.activation == "gelu"
    assert pull(str(tmp_path / "source"), models, force=True).entry.config.activation == "relu"
    assert names(models) == ["source"]


@pytest.mark.parametrize(
    "broken", ["no OPT", "no config", "no weights", "missing shard", "truncated", "no tokenizer"]
)
def test_a_model_that_cannot_be_served_never_appears(tmp_path: Path, broken: str) -> None:
    source, models = tmp_path / "source", tmp_path / "models"
    save_variant(source, "pre-norm", 1, "sharded-safetensors")
    save_variant(models / "source", "gelu", 2)
    config, shard = source / "config.json", WeightMap.read(source).files[1]
    if broken == "no OPT":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    elif broken == "no config":
        config.unlink()
    elif broken == "no weights":
        (source / "model.safetensors.index.json").unlink()
    elif broken == "missing shard":
        shard.unlink()
    elif broken == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (source / "tokenizer.json").unlink()
    reason = {
        "no OPT": r"config\.json: model_type is 'gpt2'",
        "no config": r"config\.json is missing",
        "no weights": "holds no weights",
        "missing shard": f"{shard.name} is missing",
        "truncated": f"{shard.name} is truncated",
        "no tokenizer": "holds no tokenizer",
    }[broken]
    with pytest.raises(CheckpointError, match=reason):
        pull(str(source), models, name="new")
    with pytest.raises(CheckpointError, match=reason):
        pull(str(source), models, force=True)
    assert names(models) == ["source"]
    assert catalog.find_model(models, "source").config.activation == "gelu"


@pytest.mark.parametrize("form", ["safetensors", "sharded-safetensors", "bin"])
@pytest.mark.parametrize(
    "broken",
    [
        "lacks a tensor",
        "another shape",
        "another type",
        "NaN in the last layer",
        "infinite exit head",
        "lacks an exit head",
        "another tokenizer",
        "garbled tokenizer",
    ],
)
def test_what_no_load_would_accept_is_refused_before_anything_is_written(
    tmp_path: Path, broken: str, form: Form
) -> None:
    source, models, exits = (
        tmp_path / "source",
        tmp_path / "models",
        tmp_path / "source" / "exits.safetensors",
    )
    model = save_variant(source, "pre-norm", 1, form, exits=(2, 4, 6), head="linear")
    tensors = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    name, head = "model.decoder.layers.5.fc2.weight", "exits.4.linear.weight"
    heads = load_file(exits)
    if broken == "lacks a tensor":
        del tensors[name]
    elif broken == "another shape":
        tensors[name] = tensors[name].T.contiguous()
    elif broken == "another type":
        tensors[name] = tensors[name].to(torch.int8)
    elif broken == "NaN in the last layer":
        tensors[name][3, 4] = float("nan")
    elif broken == "infinite exit head":
        heads[head][3, 4] = float("inf")
    elif broken == "lacks an exit head":
        del heads[head]
    elif broken == "another tokenizer":
        with (source / "tokenizer.json").open("a") as file:
            file.write("\n")
    else:
        (source / "tokenizer.json").write_text("{}")
        facts = json.loads((source / "helios.json").read_text()) | {"tokenizer_id": None}
        (source / "helios.json").write_text(json.dumps(facts))
    save_tensors(source, tensors, form)
    save_file(heads, exits)
    reason = {
        "lacks a tensor": r"no tensor layers\.5\.fc2\.weight",
        "another shape": r"layers\.5\.fc2\.weight has shape \[64, 32\]",
        "another type": r"layers\.5\.fc2\.weight is stored as .*(I8|int8)",
        "NaN in the last layer": r"layers\.5\.fc2\.weight holds NaN",
        "infinite exit head": r"exits\.safetensors: exits\.4\.linear\.weight holds NaN or infinite",
        "lacks an exit head": r"no tensor exits\.4\.linear\.weight",
        "another tokenizer": r"tokenizer\.json is not the tokenizer",
        "garbled tokenizer": r"tokenizer\.json is corrupt",
    }[broken]
    with pytest.raises(CheckpointError, match=reason) as raised:
        pull(str(source), models)
    # The message names the source, so that people can look at it.
    assert str(source) in raised.value.message
    assert not models.exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_tied_weights_under_the_heads_name_is_pulled(tmp_path: Path, form: Form) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1, form, tied_as="lm_head")
    entry = pull(str(tmp_path / "source"), tmp_path / "models").entry
    Engine.load(entry.path, settings=EngineSettings(memory_bytes=64 << 20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sharded_llama_is_pulled_in_its_own_type(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tmp_path / "source"
    random_model("llama", tied=False).to(dtype).save_pretrained(source, max_shard_size="40KB")
    save_variant(tmp_path / "other", "pre-norm", 1)
    shutil.copyfile(tmp_path / "other" / "tokenizer.json", source / "tokenizer.json")
    ends = {"eos_token_id": [2, 5, 9]}
    (source / "generation_config.json").write_text(json.dumps(ends))
    entry = pull(str(source), tmp_path / "models").entry
    assert len(WeightMap.read(entry.path).files) > 1
    assert (entry.config.dtype, entry.config.eos_token_ids) == (str(dtype).removeprefix("torch."), (2, 5, 9))


def test_a_llama_whose_config_and_tensors_disagree_is_refused_by_the_tensor(tmp_path: Path) -> None:
    source = tmp_path / "source"
    random_model("llama").save_pretrained(source)
    save_variant(tmp_path / "other", "pre-norm", 1)
    shutil.copyfile(tmp_path / "other" / "tokenizer.json", source / "tokenizer.json")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*\.k_proj\.weight has shape \[32"):
        pull(str(source), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_sentencepiece_model_that_cannot_be_converted_is_named_with_what_to_do(tmp_path: Path) -> None:
    source, models = tmp_path / "source", tmp_path / "models"
    save_variant(source, "pre-norm", 1)
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (source / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be converted .* install the package"):
        pull(str(source), models)
    assert not list(models.iterdir())
    # A tokenizer.json is taken instead, and the sentencepiece model is left behind.
    shutil.copyfile(tmp_path / "tokenizer.json", source / "tokenizer.json")
    assert "tokenizer.model" not in names(pull(str(source), models).entry.path)


def test_an_interrupted_pull_leaves_nothing(tmp_path: Path) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1)
    write_gguf(tmp_path / "tiny.gguf")
    models = tmp_path / "models"

    def interrupt(what: str, done: int, total: int) -> None:
        assert list(models.iterdir())
        raise KeyboardInterrupt

    for source in ("source", "tiny.gguf"):
        with pytest.raises(KeyboardInterrupt):
            pull(str(tmp_path / source), models, progress=interrupt)
        assert not list(models.iterdir())


def test_pulling_without_the_engine_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1)
    monkeypatch.setitem(sys.modules, "helios.engine.plan", None)
    with pytest.raises(SettingsError, match=r"install helios-serving\[engine\]"):
        pull(str(tmp_path / "source"), tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["../outside", ".hidden", "a/b", "", "a b"])
def test_a_name_cannot_reach_outside_the_models_directory(tmp_path: Path, name: str) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1)
    if name:
        with pytest.raises(InvalidRequestError, match="cannot name a model"):
            pull(str(tmp_path / "source"), tmp_path / "models", name=name)
    else:
        assert pull(str(tmp_path / "source"), tmp_path / "models", name=name).entry.name == "source"
    assert names(tmp_path) in (["models", "source"], ["source"])


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    save_variant(tmp_path / "source", "pre-norm", 1)
    with pytest.raises(InvalidRequestError, match="has no revisions"):
        pull(str(tmp_path / "source"), tmp_path / "models", revision="main")


def test_what_is_neither_folder_nor_repository_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="neither a folder nor a repository id"):
        pull(str(tmp_path / "gone" / "model"), tmp_path / "models")
