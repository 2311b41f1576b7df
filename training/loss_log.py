"""The losses of a run: a log with one JSON object per line, which matches the checkpoint, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot


class LossLog:
    """The log of a run, `path`. Entries have step, loss, exit_loss and sometimes held (domain -> exits)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> list[dict[str, Any]]:
        """All entries. The list is empty when there is no file yet."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a") as log:
            log.write(json.dumps(entry) + "\n")

    def cut(self, step: int) -> None:
        """Delete the entries after `step`, because a resumed run computes them again."""
        kept = [json.dumps(entry) + "\n" for entry in self.entries() if entry["step"] <= step]
        self._path.write_text("".join(kept))

    def plot(self, target: Path) -> None:
        """Plot the losses over the steps as a PNG."""
        entries = self.entries()
        if not entries:
            return
        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        steps = [entry["step"] for entry in entries]
        axes.plot(steps, [entry["loss"] for entry in entries], linewidth=0.7, label="train, last layer")
        exits = [entry["exit_loss"] for entry in entries]
        axes.plot(steps, exits, linewidth=0.4, alpha=0.6, label="train, exits")
        held = [entry for entry in entries if "held" in entry]
        for domain in held[-1]["held"] if held else ():
            known = [(entry["step"], entry["held"][domain][-1]) for entry in held if domain in entry["held"]]
            axes.plot(*zip(*known, strict=True), label=f"held out, {domain}")
        axes.set(xlabel="step", ylabel="cross-entropy, nats per token")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(target, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
