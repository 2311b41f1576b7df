"""Helios's engine against other engines: the same weights, prompts and machine, taking turns."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import engine_figures, loading, roofline
from bench.contenders import CONTENDERS, PEERS, Contender, Runners, needed_bytes, pythons
from bench.engine_figures import Cell, agreement, cell_of
from bench.peers.environment import make_environment
from bench.peers.runner import Continuation, Generate, Job
from bench.random_model import SHAPES, random_model
from bench.report import Report
from bench.roofline import Limits
from helios import catalog
from helios.architectures.registry import architecture_of
from helios.catalog import ModelEntry
from helios.errors import HeliosError, SettingsError
from helios.footprint import kv_bytes_per_token

BUNDLED = "bundled"
_ALL = "all"
_SEED = 0
# Of a contender's turn. The first run after a pause finds cold caches, and a short one says little.
_TURN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A contender's turn in a round: of its `runs` the one with the median time.

    overhead: share of decoding outside of compiled code, None for peers. agreement: share of its tokens
    before the first that differs from the reference's (the first contender in float32), None without one.
    """

    shape: str
    prompt_tokens: int
    output_tokens: int
    batch: int
    contender: str
    round: int
    runs: int
    seconds: float
    first_token_seconds: float
    overhead: float | None
    agreement: float | None
    at: str
    load_average_before: float


class _Names(click.ParamType[tuple[str, ...]]):
    """Names with commas between them, or `all`."""

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
    """Whole numbers from 1 on with commas between them."""

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
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write it here.")
@click.option(
    "--report", "report_path", type=click.Path(path_type=Path, dir_okay=False), help="Markdown with plots."
)
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
    type=_Names([*SHAPES, BUNDLED]),
    default=_ALL,
    show_default=True,
    help="Models: OPT's shapes with random weights, and the first of the models directory.",
)
@click.option("--prompts", type=_Counts(), default="32,512", show_default=True, help="Tokens of a prompt.")
@click.option("--batches", type=_Counts(), default="1,8,32,64", show_default=True, help="Prompts at once.")
@click.option("--max-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Of each.")
@click.option("--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="Of each engine.")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Default: the bundled models.")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path.home() / ".cache" / "helios",
    show_default="~/.cache/helios",
    help="Where the peers' environments and the random weights are kept.",
)
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
    """The engine's speed, alone or against transformers, CTranslate2 and vLLM.

    Every run is written to the JSON file when it is done: the same command goes on where it was stopped,
    and other options add to the file. A peer that cannot be installed or run is named in the report.
    """
    write_report = _report_writer() if report_path is not None else None
    chosen = [
        one
        for one in CONTENDERS
        if (one.engine in peers or not one.is_peer) and (contenders is None or one.name in contenders)
    ]
    if not chosen:
        raise SettingsError("nothing to measure: --contenders names engines that --peers does not")
    progress = Console(stderr=True)
    with progress.status("reading what is there") as status:
        results = _earlier(json_path, threads)
        models = {name: _model(name, models_dir, cache_dir, status.update) for name in shapes}
        results["shapes"] |= {name: _facts(model) for name, model in models.items()}
        status.update("the machine's limits")
        limits = roofline.measure(threads)
        if results["limits"]:
            limits = roofline.highest(limits, Limits(**results["limits"]))
        results["limits"] = asdict(limits)
        for name, model in models.items():
            if fresh or name not in results["loading"]:
                status.update(f"loading {name}")
                results["loading"][name] = asdict(loading.measure(model.path, threads))
        cells = [
            Cell(name, min(prompt, model.context_tokens - max_tokens), max_tokens, batch)
            for name, model in models.items()
            for prompt in prompts
            for batch in batches
        ]
        bench = _Bench(results, chosen, threads, cache_dir, json_path, status.update)
        bench.run(models, cells, repetitions, fresh=fresh)
    report = report_of(results)
    report.show()
    if json_path is not None:
        report.write(json_path)
    if write_report is not None and report_path is not None:
        write_report(report, report_path)


class _Bench:
    """A run of the bench: what is still to be measured, and the file that takes it."""

    def __init__(
        self,
        results: dict[str, Any],
        contenders: Sequence[Contender],
        threads: int,
        cache_dir: Path,
        json_path: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self._results = results
        self._contenders = contenders
        self._threads = threads
        self._cache_dir = cache_dir
        self._json_path = json_path
        self._say = say

    def run(
        self, models: dict[str, ModelEntry], cells: Sequence[Cell], repetitions: int, *, fresh: bool
    ) -> None:
        """Measures every round of every cell that the results do not have, and keeps each at once."""
        names = {one.name for one in self._contenders}
        if fresh:
            again = {(cell, name) for cell in cells for name in names}
            self._results["runs"] = [
                one for one in self._results["runs"] if (cell_of(one), one["contender"]) not in again
            ]
        self._results["failed"] = [one for one in self._results["failed"] if one["contender"] not in names]
        usable = self._installed()
        for name, model in models.items():
            own = [cell for cell in cells if cell.shape == name]
            todo = list(self._todo(own, usable, repetitions))
            runners = Runners(pythons(usable), self._logs())
            try:
                for cell, number, contenders in todo:
                    self._round(runners, model, own, cell, number, contenders)
            finally:
                runners.close()

    def _installed(self) -> dict[str, Path]:
        """The Python of every peer that can be had; the others are noted as failed."""
        found = {}
        for peer in dict.fromkeys(one.engine for one in self._contenders if one.is_peer):
            try:
                found[peer] = make_environment(peer, self._cache_dir / "peers", say=self._say)
            except HeliosError as error:
                for one in self._contenders:
                    if one.engine == peer:
                        self._failed(one, None, error)
        return found

    def _todo(
        self, cells: Sequence[Cell], usable: dict[str, Path], repetitions: int
    ) -> Iterator[tuple[Cell, int, list[Contender]]]:
        done = {(cell_of(one), one["round"], one["contender"]) for one in self._results["runs"]}
        for cell in dict.fromkeys(cells):
            for number in range(repetitions):
                missing = [
                    one
                    for one in self._contenders
                    if (one.engine in usable or not one.is_peer) and (cell, number, one.name) not in done
                ]
                if missing:
                    yield cell, number, missing

    def _round(
        self,
        runners: Runners,
        model: ModelEntry,
        cells: Sequence[Cell],
        cell: Cell,
        number: int,
        contenders: Sequence[Contender],
    ) -> None:
        """Every contender once. One that fails is noted, and left out of the cell's later rounds."""
        vocab_size = model.config.vocab_size
        other_prompts = cell.prompts(-1, vocab_size)
        reference: Continuation | None = None
        without = {one["contender"] for one in self._results["failed"] if one["cell"] == asdict(cell)}
        for one in contenders:
            if one.name in without:
                continue
            self._say(
                f"{cell.shape}, {cell.prompt_tokens} in, {cell.output_tokens} out, batch {cell.batch}, "
                f"round {number + 1}: {one.name}"
            )
            depth = one.depth(model.num_layers)
            try:
                job = self._job(one, model, depth, cells)
                runner = runners.get(one, job)
                runners.warm_up(runner, other_prompts)
                load = os.getloadavg()[0]
                runs = _turn(runner.generate, cell, number, vocab_size)
            except HeliosError as error:
                runners.drop(one)
                self._failed(one, cell, error)
                continue
            if one == CONTENDERS[0]:
                reference = runs[0]
            run = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
            self._results["runs"].append(
                asdict(
                    Measured(
                        **asdict(cell),
                        contender=one.name,
                        round=number,
                        runs=len(runs),
                        seconds=run.seconds,
                        first_token_seconds=run.first_token_seconds,
                        overhead=run.overhead,
                        agreement=None
                        if reference is None or one.depth_share < 1
                        else agreement(runs[0].token_ids, reference.token_ids),
                        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                        load_average_before=load,
                    )
                )
            )
            if self._json_path is not None:
                report_of(self._results).write(self._json_path)

    def _job(self, one: Contender, model: ModelEntry, depth: int, cells: Sequence[Cell]) -> Job:
        """Room for the largest of a model's cells."""
        config = model.config
        longest = max(cell.prompt_tokens + cell.output_tokens for cell in cells)
        most = max(cell.batch * (cell.prompt_tokens + cell.output_tokens) for cell in cells)
        converted = self._cache_dir / "converted"
        converted.mkdir(parents=True, exist_ok=True)
        kv_bytes = most * kv_bytes_per_token(config, depth, "bfloat16")
        return Job(
            model=str(model.path),
            precision=one.precision,
            threads=self._threads,
            batch=max(cell.batch for cell in cells),
            sequence_tokens=longest,
            memory_bytes=needed_bytes(one, config, kv_bytes),
            kv_bytes=kv_bytes,
            cache=str(converted),
            depth=depth,
        )

    def _logs(self) -> Path:
        path = self._cache_dir / "logs"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _failed(self, one: Contender, cell: Cell | None, error: HeliosError) -> None:
        self._results["failed"].append(
            {"contender": one.name, "cell": None if cell is None else asdict(cell), "reason": str(error)}
        )


def _turn(generate: Generate, cell: Cell, number: int, vocab_size: int) -> list[Continuation]:
    """Runs of a round's prompts, then of other ones, until the turn is over."""
    began = time.monotonic()
    runs = [generate(cell.prompts(number, vocab_size), cell.output_tokens)]
    while time.monotonic() - began < _TURN_SECONDS:
        prompts = cell.prompts(number, vocab_size, repeat=len(runs))
        runs.append(generate(prompts, cell.output_tokens))
    return runs


def report_of(results: dict[str, Any]) -> Report:
    """The report of all runs there are."""
    rows = engine_figures.summarise(results)
    shown = [(engine_figures.title(row), engine_figures.in_words(row)) for row in rows]
    shown += [
        (f"{name}, loading {loading.PRECISION}", loading.in_words(one))
        for name, one in results["loading"].items()
    ]
    shown += [(f"failed: {one['contender']}", one["reason"]) for one in results["failed"]]
    return Report({**results, "cells": rows}, engine_figures.targets(rows), shown)


def _report_writer() -> Callable[[Report, Path], None]:
    """Raises SettingsError, before anything is measured, when plots cannot be drawn here."""
    try:
        from bench.engine_report import write  # noqa: PLC0415  # Imports matplotlib.
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"--report needs {error.name}; install it with `pip install 'helios-serving[training]'`"
        ) from error
    return write


def _model(name: str, models_dir: Path | None, cache_dir: Path, say: Callable[[str], None]) -> ModelEntry:
    if name == BUNDLED:
        return catalog.list_models(catalog.find_models_dir(models_dir))[0]
    say(f"the random weights of {name}")
    return catalog.read_model(random_model(name, cache_dir / "bench-models"))


def _facts(model: ModelEntry) -> dict[str, Any]:
    return {
        "name": model.name,
        "parameters": model.config.parameters(),
        "half_depth": model.num_layers // 2,
        "config": architecture_of(model.config).write(model.config),
    }


def _earlier(path: Path | None, threads: int) -> dict[str, Any]:
    """What an earlier run left in the file. Raises SettingsError when it cannot stand beside new runs."""
    empty = {
        "settings": {"threads": threads, "seed": _SEED},
        "shapes": {},
        "limits": {},
        "loading": {},
        "runs": [],
        "failed": [],
    }
    if path is None or not path.exists():
        return empty
    try:
        results = json.loads(path.read_text())["results"]
        # Files from before there was `loading` go on too.
        earlier = {"loading": {}} | {key: results[key] for key in empty if key != "loading" or key in results}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} holds no results of this bench; name another file") from error
    if earlier["settings"] != empty["settings"]:
        raise SettingsError(
            f"{path} was measured with {earlier['settings']['threads']} threads; name another file"
        )
    return earlier
