"""A report for people: Markdown, and plots as PNG files beside it."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import Target
from helios.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_plots() -> None:
    """Raises SettingsError when plots cannot be drawn here. Call it before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsError(
            "--report needs matplotlib; install it with `pip install 'helios-serving[training]'`"
        )


class Page:
    """A report: lines of Markdown, and plots in files named after it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lines: list[str] = []

    def say(self, *paragraphs: str) -> None:
        """Adds paragraphs."""
        for paragraph in paragraphs:
            self._lines += [paragraph, ""]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Adds a table."""
        lines = [head, ["---"] * len(head), *rows]
        self._lines += [f"| {' | '.join(map(str, line))} |" for line in lines]
        self._lines.append("")

    def targets(self, targets: Sequence[Target]) -> None:
        """Adds a table of targets."""
        self.say("## Targets")
        self.table(
            ("target", "to be", "measured", "met"),
            [(one.name, one.target, one.measured, "yes" if one.met else "**no**") for one in targets],
        )

    def plot(self, name: str, title: str, draw: Callable[["Axes"], None]) -> None:
        """Draws a plot into a file beside the report, and shows it in the report."""
        from matplotlib.figure import Figure  # noqa: PLC0415  # Only plots need it.

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        file = self._path.with_name(f"{self._path.stem}-{name}.png")
        figure.savefig(file, dpi=110)
        self.say(f"![{title}]({file.name})")

    def write(self) -> None:
        """Writes the file."""
        self._path.write_text("\n".join(self._lines))
