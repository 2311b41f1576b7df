"""`helios bench served`."""

from pathlib import Path

import click
from rich.console import Console

from bench.commands.options import cache_dir_option, count_option, json_option
from bench.systems.shapes import SHAPES


@click.command()
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    required=True,
    help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens, such as the Azure LLM inference traces.",
)
@json_option
@click.option("--shape", type=click.Choice(list(SHAPES)), default="opt-125m", show_default=True)
@click.option("--depth", type=click.IntRange(min=1), help="Depth of Helios. Default: all layers.")
@count_option("--requests", "count", at_least=8, default=100)
@click.option(
    "--length-scale",
    type=click.FloatRange(min=0, min_open=True),
    default=0.25,
    show_default=True,
    help="Factor for the lengths of prompts and outputs, so that a run ends on a small machine.",
)
@count_option("--streams", default=64, help="Streams open at once.")
@count_option("--workers", default=1, help="Workers of Helios.")
@count_option("--threads", default=2, help="Threads of each system.")
@click.option("--without-vllm", is_flag=True, help="Measure Helios alone.")
@cache_dir_option("the peers' environments and the random weights are")
@click.option("--fresh", is_flag=True, help="Measure again what the JSON file already holds.")
def served(
    *,
    trace_path: Path,
    json_path: Path | None,
    shape: str,
    depth: int | None,
    count: int,
    length_scale: float,
    streams: int,
    workers: int,
    threads: int,
    without_vllm: bool,
    cache_dir: Path,
    fresh: bool,
) -> None:
    """Requests a second of the whole system under recorded traffic, against vLLM's OpenAI server.

    Both serve the same random weights, one after the other at the same share of their capacity. Every run is
    written to the JSON file when it is done: the same command goes on where it was stopped.
    """
    from bench.serving import comparison

    with Console(stderr=True).status("reading the trace") as status:
        report = comparison.compare(
            trace_path,
            shape,
            depth=depth,
            count=count,
            length_scale=length_scale,
            streams=streams,
            workers=workers,
            threads=threads,
            with_vllm=not without_vllm,
            cache_dir=cache_dir,
            json_path=json_path,
            fresh=fresh,
            say=status.update,
        )
    report.show()
    if json_path is not None:
        report.write(json_path)
