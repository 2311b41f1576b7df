"""`helios models`, over tiny models on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from helios.cli import cli
from helios.errors import CheckpointError, InvalidRequestError, UnknownDepthError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["models", *map(str, arguments)], catch_exceptions=False)


def list_by_name(models_dir: Path) -> dict[str, dict[str, Any]]:
    answer = run("list", "--json", "--models-dir", models_dir)
    return {model["name"]: model for model in json.loads(answer.stdout)}


@pytest.fixture
def models_dir(tmp_path: Path, tiny_models: Path) -> Path:
    """A models directory that the test may change, with `tiny` in it."""
    shutil.copytree(tiny_models / "tiny", tmp_path / "models" / "tiny")
    return tmp_path / "models"


def test_list_tells_what_can_be_served(tiny_models: Path) -> None:
    listed = json.loads(run("list", "--json", "--models-dir", tiny_models).stdout)
    assert [model["name"] for model in listed] == ["long", "other", "tiny"]
    tiny = listed[-1]
    assert tiny["num_layers"] == 4
    assert tiny["exit_layers"] == [1, 2, 4]
    assert tiny["default_depth"] == 4
    assert tiny["context_tokens"] == 256
    assert tiny["path"] == str(tiny_models / "tiny")
    assert len(tiny["tokenizer_id"]) == 64
    # Embedding and positions, final norm, and per layer: attention, feed-forward, two norms, biases.
    assert tiny["parameters"] == 512 * 64 + 258 * 64 + 128 + 4 * (12 * 64 * 64 + 9 * 64 + 4 * 64)


def test_list_names_what_cannot_be_served_and_why(models_dir: Path) -> None:
    (models_dir / "broken").mkdir()
    answer = run("list", "--models-dir", models_dir)
    assert answer.exit_code == 0
    assert "tiny" in answer.stdout
    assert "broken" not in answer.stdout
    assert "warning: broken cannot be served" in answer.stderr
    assert "config.json" in answer.stderr


def test_pull_from_a_folder_puts_a_model_into_the_directory(tiny_models: Path, tmp_path: Path) -> None:
    answer = run("pull", tiny_models / "other", "--name", "mine", "--models-dir", tmp_path / "new")
    assert answer.exit_code == 0
    assert answer.stdout.startswith("mine: 4 layers, depths 1, 2, 4")
    assert list_by_name(tmp_path / "new").keys() == {"mine"}


def test_pull_does_not_replace_a_model_unasked(tiny_models: Path, models_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="--force"):
        run("pull", tiny_models / "tiny", "--models-dir", models_dir)
    assert run("pull", tiny_models / "tiny", "--models-dir", models_dir, "--force").exit_code == 0


def test_what_a_precision_costs_is_measured_and_kept(models_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(shutil.__file__).read_text())
    for precision in ("float32", "int8"):
        answer = run(
            *("measure", "tiny", "--models-dir", models_dir, "--text", text),
            *("--precision", precision, "--windows", "4", "--save"),
        )
        assert answer.exit_code == 0
    listed = json.loads(run("list", "--json", "--models-dir", models_dir).stdout)
    found = next(model["precisions"] for model in listed if model["name"] == "tiny")
    for layer in ("1", "2", "4"):
        assert found["float32"][layer] == {"perplexity_increase": 0.0, "agreement": 1.0, "tokens": 4 * 255}
        assert found["int8"][layer]["perplexity_increase"] != 0
        assert 0.9 < found["int8"][layer]["agreement"] < 1
    assert "tiny in int8 against float32: perplexity " in run("list", "--models-dir", models_dir).stdout


def test_too_short_a_text_measures_nothing(models_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(InvalidRequestError, match="at least 255 tokens of tiny"):
        run("measure", "tiny", "--models-dir", models_dir, "--text", text)


def test_export_writes_a_model_of_its_own(models_dir: Path) -> None:
    answer = run("export", "tiny", models_dir / "cut", "--depth", "2", "--models-dir", models_dir)
    assert answer.exit_code == 0
    listed = {
        model["name"]: model for model in json.loads(run("list", "--json", "--models-dir", models_dir).stdout)
    }
    assert listed["cut"]["num_layers"] == 2
    assert listed["cut"]["exit_layers"] == [2]


def test_export_at_no_exit_is_refused_with_the_depths(models_dir: Path) -> None:
    with pytest.raises(UnknownDepthError, match="1, 2, 4"):
        run("export", models_dir / "tiny", models_dir / "cut", "--depth", "3")
    assert not (models_dir / "cut").exists()


def test_add_exits_makes_an_early_exit_model(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.add_exits.STATE_ROOT", tmp_path / "state")
    (models_dir / "tiny" / "helios.json").unlink()
    text = tmp_path / "text.txt"
    text.write_text(Path(shutil.__file__).read_text())
    answer = run(
        *("add-exits", "tiny", models_dir / "grown", "--models-dir", models_dir),
        *("--text", text, "--exit-layers", "1,3", "--head", "norm", "--steps", "2"),
    )
    assert answer.exit_code == 0
    assert "depths 1, 3, 4" in answer.stdout
    assert "tuning exits of tiny" in answer.stderr
    listed = {
        model["name"]: model for model in json.loads(run("list", "--json", "--models-dir", models_dir).stdout)
    }
    assert listed["tiny"]["exit_layers"] == [4]
    assert listed["grown"]["exit_layers"] == [1, 3, 4]


def test_add_exits_needs_layers_that_are_numbers(models_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x")
    answer = run("add-exits", models_dir / "tiny", tmp_path / "x", "--text", text, "--exit-layers", "1;3")
    assert answer.exit_code == 2
    assert "'1;3' is not a list of layers" in answer.stderr
