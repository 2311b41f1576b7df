"""Exits that ship without their model are found by the digest of its weights when it is pulled."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from helios.catalog import read_catalog
from helios.cli.models import models as commands
from helios.errors import CheckpointError, InvalidRequestError
from helios.facts_file import write_facts
from helios.sources.pull import pull
from helios.weights_digest import weights_digest
from tests.gguf_files import write_gguf
from tests.opt_variants import save_tensors, save_variant


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model without exits."""
    save_variant(tmp_path / "source", "pre-norm", 1)
    return tmp_path / "source"


def ship_exits(models: Path, model: Path, seed: int = 1) -> Path:
    """Exits of a model of the form of `source`, in a models directory. They are another model's heads."""
    shipped = models / "exits" / "some-model"
    shutil.rmtree(shipped, ignore_errors=True)
    with_heads = models.parent / "with-heads"
    save_variant(with_heads, "pre-norm", seed, exits=(2, 4, 6), head="norm")
    shipped.mkdir(parents=True)
    facts = json.loads((with_heads / "helios.json").read_text()) | {"weights_digest": weights_digest(model)}
    (shipped / "helios.json").write_text(json.dumps(facts))
    shutil.copyfile(with_heads / "exits.safetensors", shipped / "exits.safetensors")
    (shipped / "README.md").write_text("the card of the exits")
    return shipped


def test_a_model_gets_the_exits_that_ship_for_its_weights(tmp_path: Path, source: Path) -> None:
    models = tmp_path / "models"
    shipped = ship_exits(models, source)
    pulled = pull(str(source), models)
    assert pulled.exits_from == shipped.resolve()
    assert pulled.entry.exit_layers == (2, 4, 6)
    assert (pulled.entry.path / "EXITS.md").read_text() == "the card of the exits"
    assert (pulled.entry.path / "exits.safetensors").read_bytes() == (
        shipped / "exits.safetensors"
    ).read_bytes()
    # They are no model, and no broken one either.
    found = read_catalog(models)
    assert [entry.name for entry in found.models] == ["source"] and not found.broken


def test_the_command_says_where_exits_came_from_and_licence_and_size(tmp_path: Path, source: Path) -> None:
    models = tmp_path / "models"
    shipped = ship_exits(models, source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    result = CliRunner().invoke(commands, ["pull", str(source), "--models-dir", str(models)])
    first, exits, licence = result.stdout.splitlines()
    assert first.startswith("source: 6 layers, depths 2, 4, 6 (")
    assert exits == f"exits: 2, 4 (from {shipped.resolve()})"
    assert licence.startswith("licence: apache-2.0; ") and licence.endswith("B")


def test_exits_that_share_the_final_norm_ship_as_facts_alone(tmp_path: Path, source: Path) -> None:
    models = tmp_path / "models"
    shipped = ship_exits(models, source)
    (shipped / "exits.safetensors").unlink()
    facts = json.loads((shipped / "helios.json").read_text()) | {"exit_head": "shared"}
    (shipped / "helios.json").write_text(json.dumps(facts))
    entry = pull(str(source), models).entry
    assert entry.exit_layers == (2, 4, 6)
    assert not (entry.path / "exits.safetensors").exists()


def test_exits_of_other_weights_are_left_alone(tmp_path: Path, source: Path) -> None:
    models, other = tmp_path / "models", tmp_path / "other"
    save_variant(other, "pre-norm", 2)
    ship_exits(models, other)
    pulled = pull(str(source), models)
    assert (pulled.exits_from, pulled.entry.exit_layers) == (None, (6,))
    assert not (pulled.entry.path / "helios.json").exists()


def test_a_model_keeps_exits_of_its_own(tmp_path: Path, source: Path) -> None:
    models, own = tmp_path / "models", tmp_path / "own"
    save_variant(own, "pre-norm", 1, exits=(3, 6))
    ship_exits(models, own)
    pulled = pull(str(own), models)
    assert (pulled.exits_from, pulled.entry.exit_layers) == (None, (3, 6))


def test_weights_are_read_only_if_some_exits_have_their_form(tmp_path: Path, source: Path) -> None:
    models = tmp_path / "models"
    ship_exits(models, source)
    told: list[str] = []
    write_gguf(tmp_path / "tiny.gguf")
    pull(str(tmp_path / "tiny.gguf"), models, progress=lambda what, done, total: told.append(what))
    assert "digest of the weights" not in told
    pull(str(source), models, progress=lambda what, done, total: told.append(what))
    assert "digest of the weights" in told


def test_broken_exits_are_named_and_nothing_is_left(tmp_path: Path, source: Path) -> None:
    models = tmp_path / "models"
    shipped = ship_exits(models, source)
    heads = load_file(shipped / "exits.safetensors")
    heads["exits.4.norm.weight"][0] = float("nan")
    save_file(heads, shipped / "exits.safetensors")
    with pytest.raises(CheckpointError, match=r"exits\.4\.norm\.weight holds NaN"):
        pull(str(source), models)
    facts = json.loads((shipped / "helios.json").read_text())
    del facts["weights_digest"]
    (shipped / "helios.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"helios\.json: weights_digest is missing"):
        pull(str(source), models)
    assert [path.name for path in models.iterdir()] == ["exits"]


def test_no_model_can_take_the_name_of_the_exits(tmp_path: Path, source: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'exits' is taken"):
        pull(str(source), tmp_path / "models", name="exits")


def test_the_digest_does_not_depend_on_the_layout_of_files(tmp_path: Path) -> None:
    whole, sharded, pickled = (tmp_path / name for name in ("whole", "sharded", "pickled"))
    save_variant(whole, "pre-norm", 1, "safetensors")
    save_variant(sharded, "pre-norm", 1, "sharded-safetensors")
    save_variant(pickled, "pre-norm", 1, "bin")
    first = weights_digest(whole)
    assert weights_digest(sharded) == first
    tensors = load_file(whole / "model.safetensors")
    save_file(
        dict(reversed(tensors.items())), whole / "model.safetensors", metadata={"format": "pt", "a": "b"}
    )
    assert weights_digest(whole) == first
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: only the weights of safetensors"):
        weights_digest(pickled)


def test_the_digest_covers_names_types_shapes_and_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    changed = [
        tensors,
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"].reshape(3, 2), "b": tensors["b"]},
        {"a": tensors["a"].view(torch.int32), "b": tensors["b"]},
        {"a": tensors["a"], "b": torch.tensor([1.0, 1.0000001])},
    ]
    found = []
    for index, each in enumerate(changed):
        folder = tmp_path / str(index)
        folder.mkdir()
        save_tensors(folder, each, "safetensors")
        found.append(weights_digest(folder))
    assert len(set(found)) == len(changed)


def test_writing_facts_keeps_the_digest(tmp_path: Path, source: Path) -> None:
    models = tmp_path / "models"
    ship_exits(models, source)
    entry = pull(str(source), models).entry
    write_facts(entry.path, entry.facts)
    assert json.loads((entry.path / "helios.json").read_text())["weights_digest"] == weights_digest(source)
