"""`helios bench paper`."""

from pathlib import Path

import click
from rich.console import Console

from bench.commands.options import cache_dir_option, count_option, json_option, report_option
from bench.page import check_plots
from bench.paper import SECTION_NAMES
from helios.cli.checkpoints import models_dir_option
from helios.modes import Precision


@click.command()
@json_option
@report_option
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it works, measures nothing.")
@click.option(
    "--only", multiple=True, type=click.Choice(SECTION_NAMES), help="Only this section; repeatable."
)
@click.option("--fresh", is_flag=True, help="Measure again what the JSON file already holds.")
@models_dir_option
@count_option("--threads", default=1, help="Threads of the engine.")
@click.option(
    "--precision",
    type=click.Choice([one.value for one in Precision]),
    default="auto",
    show_default=True,
    help="Precision of the products; auto: as `helios up` serves.",
)
@click.option(
    "--memory-mib",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Memory budget of an engine.",
)
@cache_dir_option("the random weights are")
def paper(
    *,
    json_path: Path | None,
    report_path: Path | None,
    quick: bool,
    only: tuple[str, ...],
    fresh: bool,
    models_dir: Path | None,
    threads: int,
    precision: str,
    memory_mib: int,
    cache_dir: Path,
) -> None:
    """Every exit's speed, memory and quality, against full and dynamic exits on the same engine.

    Only the sections `control` and `served` start services. Each section is written to the JSON file when
    it is done; the same command goes on where it was stopped.
    """
    if report_path is not None:
        check_plots()
    from bench.paper import measurement, report

    with Console(stderr=True).status("reading the models") as status:
        found = measurement.measure(
            models_dir,
            quick=quick,
            only=only,
            threads=threads,
            precision=Precision(precision),
            memory_mib=memory_mib,
            cache_dir=cache_dir,
            json_path=json_path,
            fresh=fresh,
            say=status.update,
        )
    found.show()
    if report_path is not None:
        report.write(found, report_path)
