import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from helios import stack, stack_state
from helios.errors import SettingsError, UnavailableError
from helios.stack_state import StackState

STATE = StackState(
    pid=os.getpid(),
    gateway="127.0.0.1:50099",
    redis_url="redis://127.0.0.1:7000",
    model="tiny",
    depth=2,
    started=1.0,
    ready=True,
    processes={"gateway": 12},
)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HELIOS_STATE_DIR", str(tmp_path))
    return tmp_path


def test_running_stack_is_found_as_it_was_written(directory: Path) -> None:
    with stack_state.hold(directory):
        stack_state.write(directory, STATE)
        assert stack_state.read(directory) == STATE
        assert stack_state.find_gateway(None) == "127.0.0.1:50099"


def test_without_a_stack_the_error_says_how_to_start_one_with_the_model() -> None:
    with pytest.raises(UnavailableError, match="start one with `helios up`, or"):
        stack_state.find_gateway(None)
    with pytest.raises(UnavailableError, match="start one with `helios up --model talk`, or"):
        stack_state.find_gateway(None, "talk")


def test_state_of_a_newer_version_is_read(directory: Path) -> None:
    with stack_state.hold(directory):
        stack_state.write(directory, STATE)
        file = directory / "stack.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"colour": "blue"}))
        assert stack_state.read(directory) == STATE


@pytest.mark.parametrize("content", ["[]", "{}", "not json"])
def test_state_that_cannot_be_read_is_named(directory: Path, content: str) -> None:
    with stack_state.hold(directory):
        (directory / "stack.json").write_text(content)
        with pytest.raises(SettingsError, match="not a stack's state"):
            stack_state.read(directory)


def test_only_its_user_can_read_the_state_which_may_hold_a_password(directory: Path) -> None:
    # This file is left by a stack that was killed while it wrote.
    (directory / "stack.json.new").touch(mode=0o644)
    with stack_state.hold(directory):
        stack_state.write(directory, STATE)
        assert stat.S_IMODE((directory / "stack.json").stat().st_mode) == 0o600


def test_a_new_stack_does_not_go_on_with_what_an_earlier_ones_workers_served(directory: Path) -> None:
    kept = directory / "worker-0.plan.json"
    kept.write_text("{}")
    settings = stack.StackSettings(
        models_dir=directory,
        model="tiny",
        depth=2,
        exit_mode="greedy",
        precision="float32",
        workers=1,
        threads=1,
        gateway="127.0.0.1:0",
    )
    with stack_state.hold(directory):
        stack.Stack(settings, directory, on_line=lambda _: None, on_progress=lambda _: None)
    assert not kept.exists()


def test_nothing_is_left_of_a_stack_that_has_ended(directory: Path) -> None:
    with stack_state.hold(directory):
        stack_state.write(directory, STATE)
    assert stack_state.read(directory) is None
    assert not (directory / "stack.json").exists()


def test_state_left_by_a_killed_stack_does_not_count(directory: Path) -> None:
    # The state even has the pid of a living process.
    dying = f"""
import os, signal
from pathlib import Path
from helios import stack_state
from helios.stack_state import StackState
directory = Path({str(directory)!r})
with stack_state.hold(directory):
    stack_state.write(directory, StackState({os.getpid()}, "127.0.0.1:1", "", "tiny", 2, 0.0, ready=True))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", dying], check=False)
    assert (directory / "stack.json").exists()
    assert stack_state.read(directory) is None
    with pytest.raises(UnavailableError, match="helios up"):
        stack_state.find_gateway(None)


def test_second_stack_is_refused_and_told_where_the_first_one_is(directory: Path) -> None:
    with stack_state.hold(directory):
        stack_state.write(directory, STATE)
        with (
            pytest.raises(SettingsError, match=r"already running: gateway=127\.0\.0\.1:50099.*helios down"),
            stack_state.hold(directory),
        ):
            pytest.fail("held twice")


def test_a_look_at_the_lock_does_not_keep_a_stack_from_starting(directory: Path) -> None:
    with stack_state.hold(directory):
        pass
    for _ in range(20):
        assert not stack_state.is_held(directory)
        with stack_state.hold(directory):
            assert stack_state.is_held(directory)


def test_target_goes_before_the_running_stack(directory: Path) -> None:
    with stack_state.hold(directory):
        stack_state.write(directory, STATE)
        assert stack_state.find_gateway("elsewhere:1") == "elsewhere:1"


def test_directory_that_cannot_be_written_is_named(directory: Path) -> None:
    (directory / "file").write_text("")
    with (
        pytest.raises(SettingsError, match=r"file/state.*HELIOS_STATE_DIR"),
        stack_state.hold(directory / "file" / "state"),
    ):
        pytest.fail("held")


def test_state_follows_the_xdg_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HELIOS_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert stack_state.state_dir() == tmp_path / "xdg" / "helios"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert stack_state.state_dir() == Path("/home/someone/.local/state/helios")
