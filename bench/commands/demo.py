"""`helios demo`: traffic drifts, model and depth follow; then a timeline, and a table with baselines."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.commands.options import json_option
from helios import stack_state

if TYPE_CHECKING:
    from rich.console import Console, Group

    from bench.demo.outcome import Outcome
    from bench.demo.progress import Progress
    from helios.cli.rows import Rows


@click.command()
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=150.0,
    show_default=True,
    help="Length of the traffic, all systems together. Starting them and measuring quality adds to it.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("helios-demo.png"),
    show_default=True,
    help="Where the timeline is drawn, as PNG.",
)
@json_option
def demo(*, seconds: float, picture: Path, json_path: Path | None) -> None:
    """Serve prose, then technical prompts, then a mix, and watch models and depths follow.

    Uses the running stack, whose controller must be active, and puts its objective and pins back as they
    were; without one it starts a stack of its own. Then stacks of their own serve the same prompts under a
    single plan, with all layers (full) and with an exit for each token (dynamic), for the table at the end.
    """
    from rich.console import Console

    from bench.demo import timeline
    from bench.demo.outcome import ALL, HELIOS, SYSTEMS
    from bench.demo.phases import STREAMS
    from bench.demo.run import run
    from helios.cli.rows import show

    console = Console(highlight=False)
    running = stack_state.read(stack_state.state_dir())
    if running is not None:
        running = stack_state.find_serving()
        console.print(f"On the running stack, gateway {running.gateway}. Objective and pins are put back.")
    else:
        console.print("No stack is running: the demo starts one of its own, and stops it at the end.")
    with _View(console) as view:
        outcome = run(running, seconds, view.show)
    report = outcome.report()
    if json_path is not None:
        report.write(json_path)
    for line in timeline.as_text(outcome.timelines[HELIOS], min(console.width, 120)):
        console.print(line, markup=False, overflow="ignore", no_wrap=True, crop=False)
    show(console, _table(outcome, ALL))
    _explain(console, outcome, SYSTEMS, STREAMS)
    report.show()
    try:
        timeline.draw(outcome.timelines[HELIOS], picture)
    except ModuleNotFoundError as error:
        console.print(f"no picture: {error.name} is not installed: pip install 'helios-serving[training]'")
    except OSError as error:
        raise click.ClickException(f"the picture cannot be written to {picture}: {error.strerror}") from error
    else:
        console.print(f"picture: {picture}", soft_wrap=True)


class _View:
    """Shows the progress: a live view on a terminal, elsewhere one line for each stage and move."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._stage = ""
        # Number and time: each stack numbers its decisions from 1.
        self._said: set[tuple[int, float]] = set()

    def __enter__(self) -> "_View":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, progress: "Progress") -> None:
        """Shows the progress. Stages and moves stay on the screen."""
        from helios.cli.rows import Line, show

        if progress.stage != self._stage:
            self._stage = progress.stage
            show(self._console, Line(f"{time.strftime('%H:%M:%S')} {progress.stage}", "bold"))
        for mark in progress.marks:
            # With a router, plans are confirmed every second or two. The timeline shows these decisions.
            if mark.moves and (mark.number, mark.seconds) not in self._said:
                self._said.add((mark.number, mark.seconds))
                text = f"{mark.seconds:5.1f} s, {mark.trigger}: {mark.plan}"
                show(self._console, Line(text, "green", indent="  "))
        if self._console.is_terminal:
            self._live.update(_live(progress), refresh=True)


def _live(progress: "Progress") -> "Group":
    from rich.console import Group
    from rich.progress_bar import ProgressBar

    from bench.demo.timeline import in_words
    from helios.cli.rows import Line, Rows
    from helios.rates import WINDOW_TOKENS

    bar = ProgressBar(total=progress.total_seconds or None, completed=progress.seconds, width=60)
    if not progress.samples:
        return Group(Line(progress.stage), bar)
    sample = progress.samples[-1]
    left = ("worker", "plans with streams")
    rows = Rows(*left, f"CBC/{WINDOW_TOKENS}", "tokens/s", left=left)
    for worker in sample.workers:
        cbc = "-" if worker.cbc is None else f"{worker.cbc:.0f}"
        rows.add(worker.worker_id, in_words(worker.running), cbc, f"{worker.tokens_per_second:.0f}")
    return Group(bar, rows, Line(f"{sample.tokens_per_second:.0f} tokens/s. Quality is judged at the end."))


def _table(outcome: "Outcome", every: str) -> "Rows":
    from helios.cli.rows import Rows

    left = ("phase", "system")
    figures = ("tokens/s", "vs full", "TTFT ms", "TPOT ms", "ppl", "first", "agree", "in bound")
    table = Rows(*left, *figures, left=left, names=2)
    for phase in (every, *outcome.best):
        rows = [row for row in outcome.rows if row.phase == phase]
        full = next(row.tokens_per_second for row in rows if row.system == "full")
        for row in rows:
            table.add(
                row.phase,
                row.system,
                f"{row.tokens_per_second:.0f}",
                f"{row.tokens_per_second / full:.2f}x" if full else "-",
                f"{row.ttft_ms.p50:.0f}/{row.ttft_ms.p99:.0f}",
                f"{row.tpot_ms.p50:.1f}/{row.tpot_ms.p99:.1f}",
                f"{row.perplexity_increase:+.1%}",
                f"{row.first_increase:+.1%}",
                f"{row.agreement:.0%}",
                f"{row.within_bound:.0%}",
                style="bold" if phase == every else "",
                ends_section=row is rows[-1],
            )
    return table


def _explain(console: "Console", outcome: "Outcome", systems: dict[str, str], streams: int) -> None:
    from bench.quality.judge import FIRST_REQUESTS
    from helios.cli.rows import Line, show
    from helios.hardware import cpu_name

    show(console, *(Line(f"{name}: {what}") for name, what in systems.items()))
    text = (
        f"{streams} streams open at once, {outcome.workers} workers each, on {os.cpu_count()} cores of "
        f"{cpu_name()}. TTFT, TPOT: P50/P99; "
        "ppl: perplexity of the prompts' rest under the plans that served them, over the best candidate at "
        f"full depth; first: the same for the first {FIRST_REQUESTS} requests of a phase; agree: tokens "
        "equal to the own last layer's there; in bound: tokens in windows within the perplexity bound."
    )
    show(console, Line(text))
    best = ", ".join(f"{model} on {phase}" for phase, model in outcome.best.items())
    show(console, Line(f"The best candidates: {best}"))
    for row in outcome.rows:
        if row.failed and row.phase in outcome.best:
            said = f"{row.system}, {row.phase}: {row.failed} streams failed: {'; '.join(row.errors)}"
            show(console, Line(said, "red"))
