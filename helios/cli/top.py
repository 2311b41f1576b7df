"""`helios top`: the live view of a running stack."""

import json
import time
from typing import TYPE_CHECKING, Any

import click

from helios.cli import slo
from helios.cli.decisions import as_dict, in_one_line
from helios.cli.snapshot import Snapshot, histogram, observe
from helios.cli.target import target_option
from helios.rates import WINDOW_TOKENS

if TYPE_CHECKING:
    from rich.console import Group

_DECISIONS = 4


@click.command()
@click.option("--interval", type=click.FloatRange(min=0.2), default=1.0, show_default=True, metavar="SECONDS")
@click.option("--once", is_flag=True, help="Print one frame, measured over one interval.")
@click.option("--json", "as_json", is_flag=True, help="One frame as a JSON object.")
@target_option("gateway")
@target_option("controller", "--controller")
@target_option("profiler", "--profiler")
def top(
    *,
    interval: float,
    once: bool,
    as_json: bool,
    target: str | None,
    controller: str | None,
    profiler: str | None,
) -> None:
    """Watch workers, depths, confidence, tokens a second, latency and the last decisions. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    with observe(target, controller, profiler) as stack:
        stack.look()
        time.sleep(interval)
        frame = stack.look(_DECISIONS)
        if as_json:
            click.echo(json.dumps(_as_json(frame), indent=2))
            return
        if once:
            Console().print(draw(frame))
            return
        with Live(draw(frame), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(draw(stack.look(_DECISIONS)), refresh=True)


def _as_json(frame: Snapshot) -> dict[str, Any]:
    workers = []
    for worker in frame.workers:
        rates = frame.rates(worker)
        workers.append(
            {
                **frame.worker_as_dict(worker),
                "tokens_per_second": rates.tokens_per_second,
                "tpot_seconds": rates.tpot_seconds,
                "high_exit_share": rates.high_exit_share,
                "cbc": rates.cbc,
            }
        )
    return {
        "workers": workers,
        "open_streams": frame.status.open_streams,
        "queued_streams": frame.status.queued_streams,
        "mode": frame.mode,
        "slo": None if frame.slo is None else slo.as_dict(frame.slo),
        "decisions": [as_dict(one) for one in frame.decisions],
        "problems": list(frame.problems),
    }


def draw(frame: Snapshot) -> "Group":
    """One frame: a table of workers, a line on the whole, the last decisions and what is amiss."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns = (
        "worker",
        "model",
        "depth",
        "confidence",
        f"CBC/{WINDOW_TOKENS}",
        "tokens/s",
        "TPOT",
        "run",
        "wait",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("worker", "model", "confidence") else "right")
    for worker in frame.workers:
        load, rates, profiled = worker.telemetry, frame.rates(worker), frame.exit_profile(worker)
        table.add_row(
            escape(worker.worker_id) + (" [yellow]pinned[/]" if frame.is_pinned(worker.worker_id) else ""),
            escape(load.model) if worker.ready else f"[red]{escape(worker.reason) or 'not ready'}[/]",
            str(load.depth),
            "-" if profiled is None else histogram(profiled.confidence_counts),
            "-" if rates.cbc is None else f"{rates.cbc:.0f}",
            f"{rates.tokens_per_second:.0f}",
            "-" if rates.tpot_seconds is None else f"{1e3 * rates.tpot_seconds:.1f} ms",
            str(load.running),
            str(load.waiting),
        )
    rate = sum(frame.rates(worker).tokens_per_second for worker in frame.workers)
    streams = frame.status
    lines = [
        f"{rate:.0f} tokens/s, {streams.open_streams} streams open, {streams.queued_streams} wait for their "
        "first token",
        f"controller {frame.mode}"
        + (f", objective {slo.in_words(frame.slo)}" if frame.slo is not None else ", plans stay as they are"),
        *(in_one_line(one) for one in reversed(frame.decisions)),
    ]
    problems = [Text(f"problem: {problem}", style="red") for problem in frame.problems]
    return Group(table, *(Text(line) for line in lines), *problems)
