"""Measures the sections that the JSON file does not hold yet."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.paper.sections import SECTIONS, Section, report_of
from bench.results import Report, earlier
from bench.systems.subject import QUICK, Sizes, Subject
from helios import catalog
from helios.catalog import ModelEntry
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.threads import set_threads
from helios.modes import Precision


def measure(
    models_dir: Path | None,
    *,
    quick: bool,
    only: Sequence[str],
    threads: int,
    precision: Precision,
    memory_mib: int,
    cache_dir: Path,
    json_path: Path | None,
    fresh: bool,
    say: Callable[[str], None],
) -> Report:
    """Measures all sections, or `only` some, and writes each to `json_path` when it is done.

    Sections that the file holds are measured again only if `only` names them, or with `fresh`.
    Raises SettingsError when the file was measured with other settings.
    """
    set_threads(threads, precision)
    computed_in = EvaluationSettings(precision=precision).precision_here
    models = catalog.list_models(catalog.find_models_dir(models_dir))
    sizes = QUICK if quick else Sizes()
    settings = _settings(models, sizes, threads, computed_in, memory_mib, quick=quick)
    results = earlier(None if fresh else json_path, {"settings": settings})
    subject = Subject(models, sizes, memory_mib << 20, say, computed_in, cache_dir)
    for name in only or SECTIONS:
        if name in results and name not in only:
            continue
        results[name] = _timed(SECTIONS[name], subject)
        if json_path is not None:
            report_of(results).write(json_path)
    return report_of(results)


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
    models: Sequence[ModelEntry],
    sizes: Sizes,
    threads: int,
    precision: Precision,
    memory_mib: int,
    *,
    quick: bool,
) -> dict[str, Any]:
    """The settings on which the figures depend. All sections of one file must have the same settings."""
    content = {
        "quick": quick,
        "threads": threads,
        "precision": precision,
        "memory_mib": memory_mib,
        "sizes": asdict(sizes),
        "models": {model.name: _fingerprint(model) for model in models},
    }
    # Converted as by a round trip through the file: tuples become lists.
    return dict(json.loads(json.dumps(content)))


def _fingerprint(model: ModelEntry) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, without those that are for people."""
    digest = hashlib.sha256()
    for file in sorted(model.path.iterdir()):
        if file.is_file() and file.suffix != ".md":
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
