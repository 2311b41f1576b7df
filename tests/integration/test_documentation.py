"""The README and the pages under docs/ are true: links, programs and commands work."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from helios.cli import cli
from tests.stack import Stack

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def programs() -> dict[str, str]:
    """The Python programs of the README, by the first module that they import."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return {block.split()[1]: block for block in blocks}


def run(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))

    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_client_of_the_readme_streams_text(stack: Stack) -> None:
    worker = stack.start_worker()
    gateway = stack.start_gateway(workers=[worker.address])

    assert run(programs()["grpc"].replace("127.0.0.1:50051", gateway.address))


def test_engine_of_the_readme_generates_text() -> None:
    assert run(programs()["helios.engine"])


def commands(group: click.Group, name: str) -> Iterator[str]:
    """The full names of all commands of a group."""
    context = click.Context(group)
    for part in group.list_commands(context):
        command = group.get_command(context, part)
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}"


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert [command for command in commands(cli, "helios") if f"`{command}" not in readme] == []
