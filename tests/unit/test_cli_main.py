import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from helios.cli import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helios.cli", *arguments], capture_output=True, text=True, check=False
    )


COMMANDS = [
    *("up", "down", "generate", "chat", "status", "top", "slo", "pin", "unpin", "decisions", "profile"),
    *("models", "bench", "demo"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    answer = CliRunner().invoke(cli, [command, "--help"])
    assert answer.exit_code == 0, answer.output
    assert f"Usage: cli {command}" in answer.output


def test_help_lists_the_commands_in_their_order() -> None:
    answer = CliRunner().invoke(cli, ["--help"])
    _, _, listed = answer.output.partition("Commands:\n")
    assert [line.split()[0] for line in listed.splitlines()] == COMMANDS


def test_help_of_models_lists_what_training_brings_among_the_others() -> None:
    answer = CliRunner().invoke(cli, ["models", "--help"])
    _, _, listed = answer.output.partition("Commands:\n")
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == ["add-exits", "export", "list", "measure", "pull"]


def test_commands_are_listed_without_importing_them() -> None:
    code = (
        "import sys, click; from helios.cli import cli\n"
        "assert 'demo' in cli.list_commands(click.Context(cli))\n"
        "sys.exit(', '.join({'bench', 'training', 'helios.cli.up'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.stderr.strip() == ""


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another distribution with three commands: one runs, one lacks a library, and one does not exist."""
    metadata = tmp_path / "extra-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[helios.commands]\nhello = extra.hello:hello\nlacking = extra.lacking:run\n"
        "absent = nowhere.commands:run\n"
    )
    package = tmp_path / "extra"
    package.mkdir()
    (package / "__init__.py").touch()
    command = "import click\n@click.command()\ndef {}():\n    'Says hello.'\n    {}\n"
    (package / "hello.py").write_text(command.format("hello", "click.echo('hello')"))
    (package / "lacking.py").write_text(command.format("run", "import a_library"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.usefixtures("registered")
def test_command_of_another_distribution_is_listed_and_run() -> None:
    assert "hello    " in run("--help").stdout
    assert run("hello").stdout == "hello\n"


@pytest.mark.usefixtures("registered")
def test_command_whose_package_is_not_here_is_not_listed() -> None:
    answer = run("--help")
    assert answer.returncode == 0, answer.stderr
    assert "absent" not in answer.stdout
    assert run("absent").returncode == 2


@pytest.mark.usefixtures("registered")
def test_command_that_lacks_a_library_names_it_and_how_to_install_it() -> None:
    answer = run("lacking")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: a_library is not installed: `pip install 'helios-serving[")


@pytest.mark.parametrize(
    "module", ["helios.cli", "helios.cli.up", "helios.cli.generate", "helios.cli.status", "helios.cli.top"]
)
def test_no_command_waits_for_torch(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit(', '.join({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.stderr.strip() == ""


def test_wrong_usage_exits_with_2_and_names_what_is_wrong() -> None:
    answer = run("generate", "x", "--max-tokens", "many")
    assert answer.returncode == 2
    assert "--max-tokens" in answer.stderr
    assert run("nonsense").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("generate", "-5 degrees"), "generate -- '-5 degrees'"),
        (("generate", "--model", "tiny", "- one"), "generate -- '- one'"),
        (("models", "pull", "-x"), "models pull -- -x"),
    ],
)
def test_argument_that_begins_with_a_dash_is_told_where_it_goes(
    arguments: tuple[str, ...], hint: str
) -> None:
    answer = run(*arguments)
    assert answer.returncode == 2
    assert answer.stderr.strip().endswith(f"after --: python -m helios.cli {hint}")


@pytest.mark.parametrize("arguments", [("generate", "x", "--max-token", "4"), ("status", "-x")])
def test_option_that_is_only_misspelt_is_not_taken_for_an_argument(arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert answer.returncode == 2
    assert "after --" not in answer.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x", "--target"),
        ("status", "--target"),
        ("status", "--controller"),
        ("status", "--profiler"),
        ("top", "--target"),
        ("slo", "show", "--target"),
        ("slo", "set", "latency", "--target"),
        ("pin", "--model", "m", "--depth", "1", "--target"),
        ("unpin", "--target"),
        ("decisions", "--target"),
        ("profile", "--target"),
        ("up", "--gateway"),
    ],
)
def test_wrong_address_is_refused_before_anything_is_dialled(arguments: tuple[str, ...]) -> None:
    for address, hint in ("http://host:1", "as in host:1"), ("host", "as in host:50051"), ("", "HOST:PORT"):
        answer = CliRunner().invoke(cli, [*arguments, address])
        assert answer.exit_code == 2
        assert f"'{arguments[-1]}'" in answer.output
        assert hint in " ".join(answer.output.split())


def test_wrong_address_in_the_environment_is_refused_with_its_variable() -> None:
    answer = CliRunner().invoke(cli, ["status"], env={"HELIOS_TARGET": "host"})
    assert answer.exit_code == 2
    assert "HELIOS_TARGET" in answer.output


def test_log_of_a_detached_stack_is_begun_anew_at_its_size_with_all_that_goes_to_stderr(
    tmp_path: Path,
) -> None:
    log = tmp_path / "up.log"
    code = (
        "import logging, os, sys; from helios.cli.up import _StderrLog\n"
        "handler = _StderrLog(sys.argv[1], maxBytes=1000, backupCount=2)\n"
        "for i in range(200):\n"
        "    handler.emit(logging.makeLogRecord({'msg': f'logged {i}'}))\n"
        "    os.write(2, f'raw {i}\\n'.encode())\n"
    )
    with log.open("ab") as sink:
        subprocess.run([sys.executable, "-c", code, str(log)], stderr=sink, check=True)
    kept = [log.with_name("up.log.2"), log.with_name("up.log.1"), log]
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert all(one.stat().st_size < 1100 for one in kept)
    lines = "".join(one.read_text() for one in kept).splitlines()
    said = [f"{how} {i}" for i in range(200) for how in ("logged", "raw")]
    assert lines == said[-len(lines) :]


def test_error_is_one_line_without_traceback() -> None:
    answer = run("models", "list", "--models-dir", "/nowhere")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
    assert "/nowhere" in answer.stderr
    assert answer.stderr.count("\n") == 1
