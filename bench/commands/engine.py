"""`helios bench engine`."""

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from bench.commands.options import cache_dir_option, count_option, json_option, report_option
from bench.page import check_plots
from bench.peers.contenders import CONTENDERS, PEERS
from bench.systems.shapes import SHAPES
from helios.cli.checkpoints import models_dir_option
from helios.errors import SettingsError

# Selects all names of an option.
_ALL = "all"
# This shape is the first model of the models directory.
_BUNDLED = "bundled"


class _Names(click.ParamType[tuple[str, ...]]):
    """Comma-separated names, or `all`."""

    name = "NAMES"

    def __init__(self, known: Sequence[str]) -> None:
        self._known = tuple(known)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = self._known if value == _ALL else tuple(str(value).split(","))
        unknown = [name for name in names if name not in self._known]
        if unknown:
            self.fail(f"{', '.join(unknown)}; there are {', '.join(self._known)}", param, ctx)
        return names


class _Counts(click.ParamType[tuple[int, ...]]):
    """Comma-separated whole numbers of at least 1."""

    name = "COUNTS"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is no list of whole numbers", param, ctx)
        return tuple(map(int, parts))


@click.command()
@json_option
@report_option
@click.option(
    "--peers",
    type=_Names(PEERS),
    is_flag=False,
    flag_value=_ALL,
    default=(),
    help=f"Other engines, installed when missing. Without names: all ({', '.join(PEERS)}).",
)
@click.option(
    "--contenders",
    type=_Names([one.name for one in CONTENDERS]),
    help="Only these of the chosen engines and Helios, such as ctranslate2-int8,helios-int8.",
)
@click.option(
    "--shapes",
    type=_Names([*SHAPES, _BUNDLED]),
    default=_ALL,
    show_default=True,
    help="Models: OPT's and Llama's shapes with random weights, and the first of the models directory.",
)
@click.option("--prompts", type=_Counts(), default="32,512", show_default=True, help="Tokens of a prompt.")
@click.option("--batches", type=_Counts(), default="1,8,32,64", show_default=True, help="Prompts at once.")
@count_option("--max-tokens", at_least=2, default=64, help="Tokens generated for each prompt.")
@count_option("--repetitions", default=3, help="Rounds, in which all take turns.")
@count_option("--threads", default=2, help="Threads of each engine.")
@models_dir_option
@cache_dir_option("the peers' environments and the random weights are")
@click.option("--fresh", is_flag=True, help="Measure again what these options select.")
def engine(
    *,
    json_path: Path | None,
    report_path: Path | None,
    peers: tuple[str, ...],
    contenders: tuple[str, ...] | None,
    shapes: tuple[str, ...],
    prompts: tuple[int, ...],
    batches: tuple[int, ...],
    max_tokens: int,
    repetitions: int,
    threads: int,
    models_dir: Path | None,
    cache_dir: Path,
    fresh: bool,
) -> None:
    """The engine's speed, alone or against transformers, CTranslate2, vLLM and llama.cpp.

    Every run is written to the JSON file when it is done: the same command goes on where it was stopped,
    and other options add to the file. A peer that cannot be installed or run is named in the report.
    """
    if report_path is not None:
        check_plots()
    chosen = [
        one
        for one in CONTENDERS
        if (one.engine in peers or not one.is_peer) and (contenders is None or one.name in contenders)
    ]
    if not chosen:
        raise SettingsError("nothing to measure: --contenders names engines that --peers does not")
    from bench.engine import comparison, report

    with Console(stderr=True).status("reading what is there") as status:
        found = comparison.compare(
            chosen,
            shapes,
            models_dir,
            prompts=prompts,
            batches=batches,
            max_tokens=max_tokens,
            rounds=repetitions,
            threads=threads,
            cache_dir=cache_dir,
            json_path=json_path,
            fresh=fresh,
            say=status.update,
        )
    found.show()
    if json_path is not None:
        found.write(json_path)
    if report_path is not None:
        report.write(found, report_path)
