"""HELIOS against the paper's claims (arXiv 2504.10724): on the engine alone, but for
what profiling and control cost, which only real services tell."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import baselines, control, curve, footprint, insights, loop, reloads, saturation, shape
from bench.claims import claims
from bench.report import Report, Target
from bench.subject import CACHE_DIR, QUICK, Sizes, Subject
from helios import catalog
from helios.catalog import ModelEntry
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.threads import set_threads
from helios.errors import SettingsError
from helios.modes import Precision


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the bench that can be run alone. `targets` reads what `measure` found."""

    measure: Callable[[Subject], dict[str, Any]]
    targets: Callable[[dict[str, Any]], list[Target]]


SECTIONS = {
    "curve": Section(curve.measure, curve.targets),
    "baselines": Section(baselines.measure, baselines.targets),
    "memory": Section(footprint.measure, footprint.targets),
    "shape": Section(shape.measure, shape.targets),
    "insights": Section(insights.measure, insights.targets),
    "saturation": Section(saturation.measure, saturation.targets),
    "policy": Section(loop.measure, loop.targets),
    "control": Section(control.measure, control.targets),
    "reloads": Section(reloads.measure, reloads.targets),
}


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write it here.")
@click.option(
    "--report", "report_path", type=click.Path(path_type=Path, dir_okay=False), help="Markdown with plots."
)
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it works, measures nothing.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Only this section; repeatable."
)
@click.option("--fresh", is_flag=True, help="Measure again what the JSON file already holds.")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Default: the bundled models.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of the engine.")
@click.option(
    "--precision",
    type=click.Choice([one.value for one in Precision]),
    default="auto",
    show_default=True,
    help="Numbers computed in; auto: as `helios up` serves.",
)
@click.option(
    "--memory-mib", type=click.IntRange(min=1), default=512, show_default=True, help="Budget of an engine."
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=CACHE_DIR,
    show_default="~/.cache/helios",
    help="Where the random weights are kept.",
)
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

    Only the section `control` starts services. Each section is written to the JSON file when it is done; the
    same command goes on where it was stopped.
    """
    write_report = _report_writer() if report_path is not None else None
    set_threads(threads)
    computed_in = EvaluationSettings(precision=precision).precision_here
    models = catalog.list_models(catalog.find_models_dir(models_dir))
    sizes = QUICK if quick else Sizes()
    settings = _settings(models, sizes, threads, computed_in, memory_mib, quick=quick)
    results = {} if fresh or json_path is None else _earlier(json_path, settings)
    results["settings"] = settings
    progress = Console(stderr=True)
    with progress.status("reading the models") as status:
        subject = Subject(models, sizes, memory_mib << 20, status.update, computed_in, cache_dir)
        for name in only or SECTIONS:
            if name in results and name not in only:
                continue
            results[name] = _timed(SECTIONS[name], subject)
            if json_path is not None:
                report_of(results).write(json_path)
    report = report_of(results)
    report.show()
    if write_report is not None and report_path is not None:
        write_report(report, report_path)


def report_of(results: dict[str, Any]) -> Report:
    """The report of the sections that are there, in their order."""
    found = {name: results[name] for name in SECTIONS if name in results}
    targets = [target for name, result in found.items() for target in SECTIONS[name].targets(result)]
    against = claims(found)
    rows = [(f"{claim.name}: {claim.paper}", claim.measured) for claim in against]
    rows.append(
        ("seconds", ", ".join(f"{name} {one['cost']['wall_seconds']:.0f}" for name, one in found.items()))
    )
    compared = [asdict(claim) for claim in against]
    return Report({"settings": results["settings"], **found, "claims": compared}, targets, rows)


def _report_writer() -> Callable[[Report, Path], None]:
    """Raises SettingsError, before anything is measured, when plots cannot be drawn here."""
    try:
        from bench.paper_report import write  # noqa: PLC0415  # Imports matplotlib.
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"--report needs {error.name}; install it with `pip install 'helios-serving[training]'`"
        ) from error
    return write


def _timed(section: Section, subject: Subject) -> dict[str, Any]:
    began, began_cpu, load = time.perf_counter(), time.process_time(), os.getloadavg()[0]
    result = section.measure(subject)
    cost = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - began_cpu,
        "load_average_before": load,
    }
    return {**result, "cost": cost}


def _settings(
    models: list[ModelEntry],
    sizes: Sizes,
    threads: int,
    precision: Precision,
    memory_mib: int,
    *,
    quick: bool,
) -> dict[str, Any]:
    """What decides the figures: sections of one file are only comparable when all of it is equal."""
    content = {
        "quick": quick,
        "threads": threads,
        "precision": precision,
        "memory_mib": memory_mib,
        "sizes": asdict(sizes),
        "models": {model.name: _fingerprint(model) for model in models},
    }
    # As it comes back from a file.
    return dict(json.loads(json.dumps(content)))


def _fingerprint(model: ModelEntry) -> str:
    """SHA-256 over the names and contents of a checkpoint's files but its texts for people."""
    digest = hashlib.sha256()
    for file in sorted(model.path.iterdir()):
        if file.is_file() and file.suffix != ".md":
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The sections that an earlier run left. Raises SettingsError when they cannot stand beside new ones."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())["results"]
        before = results["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} holds no results of this bench; name another file or --fresh") from error
    if before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise SettingsError(f"{path} was measured with other {changed}; name another file or --fresh")
    return dict(results)
