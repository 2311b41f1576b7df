"""The result of a bench: figures, their machine and command, and targets that were met or missed.

A bench that was stopped resumes from the figures in its JSON file.
"""

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from helios.cli.rows import Rows, show
from helios.errors import SettingsError
from helios.hardware import cpu_name

_VERSIONS_OF = ("torch", "transformers", "grpcio", "tokenizers")


@dataclass(frozen=True, slots=True)
class Target:
    """A measured figure and its target. `target` says in words which value it must have."""

    name: str
    target: str
    measured: float | int | str
    met: bool


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a bench. A person reads `rows` (name, figure) first."""

    results: dict[str, Any]
    targets: list[Target]
    rows: list[tuple[str, str]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes it as JSON, with the machine and the command."""
        content = {
            "machine": machine(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "results": self.results,
            "targets": [asdict(target) for target in self.targets],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")

    def show(self) -> None:
        """Prints it to stdout."""
        console = Console()
        figures = Rows("", "", left=("",))
        for name, figure in self.rows:
            figures.add(name, figure)
        left = ("target", "to be", "measured", "met")
        targets = Rows(*left, left=left)
        for target in self.targets:
            met = Text("yes", "green") if target.met else Text("no", "red")
            targets.add(target.name, target.target, str(target.measured), met)
        show(console, figures, targets)


def earlier(
    path: Path | None, empty: Mapping[str, Any], remedy: str = "name another file or --fresh"
) -> dict[str, Any]:
    """The results that an earlier run left in `path`. New results are added to them.

    `empty` holds the settings of this run, under `settings`, and empty lists of results. It is returned when
    there is no file. Raises SettingsError, which names the `remedy`, when another bench wrote the file or its
    settings differ.
    """
    if path is None or not path.exists():
        return dict(empty)
    try:
        results = json.loads(path.read_text())["results"]
        before, settings = dict(results["settings"]), empty["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} holds no results of this bench; {remedy}") from error
    if before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise SettingsError(f"{path} was measured with other {changed}; {remedy}")
    return {**empty, **results}


def machine() -> dict[str, Any]:
    """The machine, and the versions of the packages on which speed depends."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _VERSIONS_OF},
    }


def _finite(value: Any) -> Any:
    # JSON has no NaN. A figure that could not be measured becomes null.
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
