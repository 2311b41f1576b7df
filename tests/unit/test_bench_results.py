"""A bench resumes from its file, and checks that it can draw a report."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.results import Report, earlier
from helios.cli import cli
from helios.errors import SettingsError

EMPTY: dict[str, Any] = {"settings": {"threads": 2, "seed": 0}, "runs": [], "failed": []}


def test_bench_without_a_file_begins_with_nothing(tmp_path: Path) -> None:
    assert earlier(None, EMPTY) == earlier(tmp_path / "absent.json", EMPTY) == EMPTY


def test_bench_goes_on_from_what_its_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    Report({"settings": EMPTY["settings"], "runs": [1, 2]}, []).write(path)
    assert earlier(path, EMPTY) == EMPTY | {"runs": [1, 2]}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"results": {}}', '{"results": []}', '{"results": {"settings": 1}}']
)
def test_file_of_something_else_is_refused_with_a_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"bench\.json holds no results of this bench; use another"):
        earlier(path, EMPTY, "use another")
    assert path.read_text() == content


def test_file_of_other_settings_is_refused_and_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"results": {"settings": {"threads": 1, "seed": 0}, "runs": []}}))
    with pytest.raises(SettingsError, match="measured with other threads; name another file or --fresh"):
        earlier(path, EMPTY)


@pytest.mark.parametrize("bench", ["paper", "engine"])
def test_report_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    answer = CliRunner().invoke(cli, ["bench", bench, "--report", str(tmp_path / "report.md")])
    assert isinstance(answer.exception, SettingsError)
    assert "--report needs matplotlib" in answer.exception.message
