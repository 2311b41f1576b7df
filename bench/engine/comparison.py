"""Compares Helios's engine with others, in turns: same weights, same prompts, same machine."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.engine import figures, loading, roofline
from bench.engine.figures import Cell, agreement, cell_of
from bench.engine.roofline import Limits
from bench.peers.contenders import CONTENDERS, Contender, Runners, needed_bytes, pythons
from bench.peers.environment import make_environment
from bench.peers.runner import Continuation, Generate, Job
from bench.results import Report, earlier
from bench.systems.gguf_model import gguf_model
from bench.systems.random_model import random_model
from bench.systems.shapes import SHAPES
from helios import catalog
from helios.architectures.registry import architecture_of
from helios.catalog import ModelEntry
from helios.errors import HeliosError, UnavailableError
from helios.footprint import kv_bytes_per_token

_SEED = 0
# A contender's turn takes at least this long, because the first run after a pause has cold caches.
_TURN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A contender's turn in a round: of its `runs`, the one with the median time.

    overhead: share of the decoding time outside of compiled code; None for peers. agreement: share of its
    tokens before the first one that differs from the reference (the first contender); None: no reference.
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


def compare(
    contenders: Sequence[Contender],
    shapes: Sequence[str],
    models_dir: Path | None,
    *,
    prompts: Sequence[int],
    batches: Sequence[int],
    max_tokens: int,
    rounds: int,
    threads: int,
    cache_dir: Path,
    json_path: Path | None,
    fresh: bool,
    say: Callable[[str], None],
) -> Report:
    """Measures every contender in turns, on every model, prompt length and batch.

    shapes: names of models, as `_model` takes them. prompts: lengths in tokens. fresh: measures the
    selected cells again. Runs in `json_path` are kept, and each new one is added when it ends. Raises
    SettingsError when the file was measured with other settings.
    """
    results = earlier(json_path, _empty(threads), "name another file")
    models = {name: _model(name, models_dir, cache_dir, say) for name in shapes}
    results["shapes"] |= {name: _facts(model) for name, model in models.items()}
    say("the machine's limits")
    limits = roofline.measure(threads)
    if results["limits"]:
        limits = roofline.highest(limits, Limits(**results["limits"]))
    results["limits"] = asdict(limits)
    for name, model in models.items():
        if fresh or name not in results["loading"]:
            say(f"loading {name}")
            results["loading"][name] = asdict(loading.measure(model.path, threads))
    cells = [
        Cell(name, min(prompt, model.context_tokens - max_tokens), max_tokens, batch)
        for name, model in models.items()
        for prompt in prompts
        for batch in batches
    ]
    comparison = _Comparison(results, contenders, threads, cache_dir, json_path, say)
    comparison.run(models, cells, rounds, fresh=fresh)
    return report_of(results)


class _Comparison:
    """A run of the comparison: the results so far, and the file that keeps them."""

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
        self, models: Mapping[str, ModelEntry], cells: Sequence[Cell], rounds: int, *, fresh: bool
    ) -> None:
        """Measures all rounds and cells that the results lack, and writes each one when it ends."""
        names = {one.name for one in self._contenders}
        if fresh:
            again = {(cell, name) for cell in cells for name in names}
            self._results["runs"] = [
                one for one in self._results["runs"] if (cell_of(one), one["contender"]) not in again
            ]
        self._results["failed"] = [one for one in self._results["failed"] if one["contender"] not in names]
        usable = self._installed(models)
        for name, model in models.items():
            own = [cell for cell in cells if cell.shape == name]
            todo = list(self._todo(model, own, usable, rounds))
            runners = Runners(pythons(usable), self._logs())
            try:
                for cell, number, contenders in todo:
                    self._round(runners, model, own, cell, number, contenders)
            finally:
                runners.close()

    def _installed(self, models: Mapping[str, ModelEntry]) -> dict[str, Path]:
        """The Python of every peer that can be installed. The other peers are recorded as failed.

        A contender without the architecture of a model is recorded as failed for this model.
        """
        found = {}
        for one in self._contenders:
            lacking = [name for name, model in models.items() if not one.serves(model.config.model_type)]
            if lacking:
                reason = f"it does not have the architecture of {', '.join(lacking)}"
                self._failed(one, None, UnavailableError(reason))
        kinds = {model.config.model_type for model in models.values()}
        able = [one for one in self._contenders if one.is_peer and any(map(one.serves, kinds))]
        for peer in dict.fromkeys(one.engine for one in able):
            try:
                found[peer] = make_environment(peer, self._cache_dir / "peers", say=self._say)
            except HeliosError as error:
                for one in self._contenders:
                    if one.engine == peer:
                        self._failed(one, None, error)
        return found

    def _todo(
        self, model: ModelEntry, cells: Sequence[Cell], usable: Mapping[str, Path], rounds: int
    ) -> Iterator[tuple[Cell, int, list[Contender]]]:
        able = [one for one in self._contenders if one.serves(model.config.model_type)]
        done = {(cell_of(one), one["round"], one["contender"]) for one in self._results["runs"]}
        for cell in dict.fromkeys(cells):
            for number in range(rounds):
                missing = [
                    one
                    for one in able
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
        """Runs every contender once. One that fails is recorded, and left out in later rounds of the cell."""
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
        """The job of a contender: what it loads, with room for the model's largest cell."""
        config = model.config
        longest = max(cell.prompt_tokens + cell.output_tokens for cell in cells)
        most = max(cell.batch * (cell.prompt_tokens + cell.output_tokens) for cell in cells)
        converted = self._cache_dir / "converted"
        converted.mkdir(parents=True, exist_ok=True)
        kv_bytes = most * kv_bytes_per_token(config, depth, "bfloat16")
        path = model.path
        if one.reads_gguf:
            path = gguf_model(path, one.precision.upper(), converted)
        return Job(
            model=str(path),
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
    """Runs the prompts of a round, then other prompts until the turn is over."""
    began = time.monotonic()
    runs = [generate(cell.prompts(number, vocab_size), cell.output_tokens)]
    while time.monotonic() - began < _TURN_SECONDS:
        prompts = cell.prompts(number, vocab_size, repeat=len(runs))
        runs.append(generate(prompts, cell.output_tokens))
    return runs


def report_of(results: dict[str, Any]) -> Report:
    """The report of all runs so far."""
    rows = figures.summarise(results)
    shown = [(figures.title(row), figures.in_words(row)) for row in rows]
    shown += [
        (f"{name}, loading {loading.PRECISION}", loading.in_words(one))
        for name, one in results["loading"].items()
    ]
    shown += [(f"failed: {one['contender']}", one["reason"]) for one in results["failed"]]
    return Report({**results, "cells": rows}, figures.targets(rows), shown)


def _model(name: str, models_dir: Path | None, cache_dir: Path, say: Callable[[str], None]) -> ModelEntry:
    """A model with random weights if `name` is one of the shapes, else the first model of `models_dir`."""
    if name not in SHAPES:
        return catalog.list_models(catalog.find_models_dir(models_dir))[0]
    say(f"the random weights of {name}")
    return catalog.read_model(random_model(name, cache_dir / "bench-models"))


def _facts(model: ModelEntry) -> dict[str, Any]:
    return {
        "name": model.name,
        "parameters": model.config.parameters(),
        "half_depth": model.num_layers // 2,
        # In the form of config.json, so that it equals what comes back from the results file.
        "config": architecture_of(model.config).write(model.config),
    }


def _empty(threads: int) -> dict[str, Any]:
    """The results of a run that has measured nothing yet."""
    return {
        "settings": {"threads": threads, "seed": _SEED},
        "shapes": {},
        "limits": {},
        "loading": {},
        "runs": [],
        "failed": [],
    }
