"""`helios bench engine` over a tiny model: the form of its results, resuming and messages, never speed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import bench.engine.comparison
from bench.engine import roofline
from bench.engine.roofline import Limits
from helios.cli import cli
from helios.errors import UnavailableError

CONTENDERS = ("helios-int8", "helios-int8-half")


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    shutil.copytree(tiny_models / "tiny", directory / "tiny")
    return directory


def run(models: Path, out: Path, *options: str) -> Result:
    arguments = ["bench", "engine", "--json", str(out), "--models-dir", str(models), "--shapes", "bundled"]
    arguments += ["--prompts", "5", "--batches", "1,2", "--max-tokens", "3", "--threads", "1"]
    arguments += ["--cache-dir", str(out.parent), "--contenders", ",".join(CONTENDERS), *options]
    return CliRunner().invoke(cli, arguments)


@pytest.fixture(scope="module")
def measured(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON file of one round, with a report beside it. The machine's limits are really measured."""
    out = tmp_path_factory.mktemp("engine") / "engine.json"
    answer = run(models, out, "--repetitions", "1", "--report", str(out.with_suffix(".md")))
    assert answer.exit_code == 0, answer.output
    return out


def results(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["results"])


def test_every_contender_has_figures_in_every_cell(measured: Path) -> None:
    content = json.loads(measured.read_text())
    assert content["machine"]["cores"] >= 1
    assert content["results"]["failed"] == []
    cells = content["results"]["cells"]
    assert {(row["batch"], row["contender"]) for row in cells} == {
        (batch, name) for batch in (1, 2) for name in CONTENDERS
    }
    for row in cells:
        rate = row["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert row["ttft_ms"] > 0
        assert row["tpot_ms"] > 0
        assert row["share_of_roofline"] > 0
        assert ("full_depth" in row["ratio_to"]) == (row["contender"] == "helios-int8-half")
    limits = Limits(**content["results"]["limits"])
    assert limits.bytes_per_second > 0
    assert set(limits.operations_per_second) == {"float32", "bfloat16", "int8"}


def test_the_report_shows_every_cell_and_its_plot(measured: Path) -> None:
    text = measured.with_suffix(".md").read_text()
    assert all(f"| {batch} | {name} |" in text for batch in (1, 2) for name in CONTENDERS)
    assert (measured.parent / "engine-bundled-5.png").stat().st_size > 0


def test_the_same_command_goes_on_where_it_was_stopped(
    models: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(measured.read_text())
    limits = Limits(**content["results"]["limits"])
    # This is a busier moment. The higher figures that were measured before must stay.
    monkeypatch.setattr(roofline, "measure", lambda _: replace(limits, bytes_per_second=1.0))
    out = tmp_path / "engine.json"
    # This looks as if the bench had been stopped before the last run.
    *kept, last = content["results"]["runs"]
    content["results"]["runs"] = kept
    out.write_text(json.dumps(content))
    answer = run(models, out, "--repetitions", "1")
    assert answer.exit_code == 0, answer.output
    assert Limits(**results(out)["limits"]) == limits
    *again, added = results(out)["runs"]
    assert again == kept
    same = ("shape", "batch", "contender", "round")
    assert [added[key] for key in same] == [last[key] for key in same]


def test_runs_with_other_threads_do_not_join_a_file(models: Path, measured: Path) -> None:
    before = measured.read_bytes()
    answer = run(models, measured, "--threads", "2")
    assert answer.exit_code == 1
    assert "name another file" in str(answer.exception)
    assert measured.read_bytes() == before


def test_a_peer_that_cannot_be_had_is_reported_and_the_others_run(
    models: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(peer: str, *_: object, **__: object) -> Path:
        raise UnavailableError(f"{peer} cannot be installed: no network")

    monkeypatch.setattr(bench.engine.comparison, "make_environment", fail)
    monkeypatch.setattr(roofline, "measure", lambda _: Limits(**results(measured)["limits"]))
    out = tmp_path / "engine.json"
    shutil.copyfile(measured, out)
    names = ",".join((*CONTENDERS, "vllm-bfloat16"))
    answer = run(models, out, "--repetitions", "1", "--peers", "vllm", "--contenders", names)
    assert answer.exit_code == 0, answer.output
    (failed,) = results(out)["failed"]
    assert (failed["contender"], failed["cell"]) == ("vllm-bfloat16", None)
    assert "no network" in answer.output
    assert len(results(out)["runs"]) == len(results(measured)["runs"])


def test_unknown_names_are_refused_with_those_there_are(models: Path, tmp_path: Path) -> None:
    answer = run(models, tmp_path / "engine.json", "--peers", "vlm")
    assert answer.exit_code == 2
    assert "transformers, ctranslate2, vllm" in answer.output
