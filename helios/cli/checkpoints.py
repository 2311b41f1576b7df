"""Shared code of commands that work on checkpoints: options, finding a model, and wording."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from helios import catalog
from helios.catalog import ModelEntry

if TYPE_CHECKING:
    from rich.progress import Progress

models_dir_option = click.option(
    "--models-dir", type=click.Path(path_type=Path), help="Default: the bundled models."
)
force_option = click.option("--force", is_flag=True, help="Replace what is there.")


def find_checkpoint(source: str, models_dir: Path | None) -> ModelEntry:
    """The model in the folder `source`, or of that name in the models directory.

    Raises CheckpointError, UnknownModelError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return catalog.read_model(folder)
    return catalog.find_model(catalog.find_models_dir(models_dir), source)


def depths_in_words(entry: ModelEntry) -> str:
    """The depths at which a model can be served, in words."""
    return ", ".join(map(str, entry.exit_layers))


def progress_bars() -> "Progress":
    """Progress bars on stderr, so that stdout holds only the command's answer."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True))


def byte_bars() -> "Progress":
    """The same for what is counted in bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
