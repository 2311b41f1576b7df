"""What a bench hands back: figures, the machine and command they come from, and targets met or not."""

import importlib.metadata
import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from helios.cli.rows import Rows, show
from helios.hardware import cpu_name

_VERSIONS_OF = ("torch", "transformers", "grpcio", "tokenizers")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure against what it is to be. `target` says it in words."""

    name: str
    target: str
    measured: float | int | str
    met: bool


@dataclass(frozen=True, slots=True)
class Report:
    """A bench's outcome. `rows` are what a person reads first: name and figure."""

    results: dict[str, Any]
    targets: list[Target]
    rows: list[tuple[str, str]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes it as JSON, with machine and command."""
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


def machine() -> dict[str, Any]:
    """The machine, and the versions of what decides speed."""
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
    # JSON has no NaN: what could not be measured is null.
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
