"""`helios bench serve`."""

from pathlib import Path

import click
from rich.console import Console

from bench.commands.options import count_option, json_option
from helios.cli.checkpoints import models_dir_option


@click.command()
@json_option
@count_option("--streams", default=64, help="Streams open at once.")
@count_option("--max-tokens", at_least=2, default=64, help="Tokens of each stream.")
@click.option("--workers", type=click.IntRange(min=1), help="Default: as `helios up`.")
@models_dir_option
@click.option("--model", help="Default: the first of the models directory.")
@click.option("--depth", type=click.IntRange(min=1), help="Default: the model's own choice.")
def serve(
    *,
    json_path: Path | None,
    streams: int,
    max_tokens: int,
    workers: int | None,
    models_dir: Path | None,
    model: str | None,
    depth: int | None,
) -> None:
    """Concurrent greedy streams, through the gateway and straight to the workers, checked with transformers.

    Starts stacks of its own; a running one is left alone, but shares the machine.
    """
    from bench.serving import serving_path

    with Console(stderr=True).status("starting a stack") as status:
        report = serving_path.measure(
            streams,
            max_tokens,
            workers=workers,
            models_dir=models_dir,
            model=model,
            depth=depth,
            say=status.update,
        )
    report.show()
    if json_path is not None:
        report.write(json_path)
