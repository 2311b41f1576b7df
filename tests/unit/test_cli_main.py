import subprocess
import sys

import pytest
from click.testing import CliRunner

from helios.cli import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helios.cli", *arguments], capture_output=True, text=True, check=False
    )


COMMANDS = ["up", "down", "generate", "status", "top", "slo", "pin", "unpin", "decisions", "models", "bench"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    answer = CliRunner().invoke(cli, [command, "--help"])
    assert answer.exit_code == 0, answer.output
    assert f"Usage: cli {command}" in answer.output


def test_help_lists_the_commands() -> None:
    answer = CliRunner().invoke(cli, ["--help"])
    assert all(name in answer.output for name in COMMANDS)


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


def test_error_is_one_line_without_traceback() -> None:
    answer = run("models", "list", "--models-dir", "/nowhere")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
    assert "/nowhere" in answer.stderr
    assert answer.stderr.count("\n") == 1
