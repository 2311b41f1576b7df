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


def test_error_is_one_line_without_traceback() -> None:
    answer = run("models", "list", "--models-dir", "/nowhere")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
    assert "/nowhere" in answer.stderr
    assert answer.stderr.count("\n") == 1
