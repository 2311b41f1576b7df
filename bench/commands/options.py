"""Options that several benches share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bench.systems.cache import CACHE_DIR

_Command = TypeVar("_Command", bound=Callable[..., Any])

json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the figures to this file.",
)
report_option = click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a report to this file: Markdown, with plots.",
)


def count_option(
    *names: str, default: int, at_least: int = 1, help: str | None = None
) -> Callable[[_Command], _Command]:
    """An option whose value is a whole number: a count."""
    return click.option(
        *names, type=click.IntRange(min=at_least), default=default, show_default=True, help=help
    )


def cache_dir_option(kept: str) -> Callable[[_Command], _Command]:
    """The option for a cache folder. `kept` says in words what the folder holds."""
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=CACHE_DIR,
        show_default="~/.cache/helios",
        help=f"Where {kept} kept.",
    )
