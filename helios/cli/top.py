"""`helios top`: the live view of a running stack."""

import json
import time
from typing import TYPE_CHECKING, Any

import click

from helios.cli import router, slo
from helios.cli.decisions import as_dict, in_one_line
from helios.cli.snapshot import Snapshot, histogram, observe, plan_loads
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

    from helios.cli.rows import show

    with observe(target, controller, profiler) as stack:
        stack.look()
        time.sleep(interval)
        frame = stack.look(_DECISIONS)
        if as_json:
            click.echo(json.dumps(_as_json(frame), indent=2))
            return
        if once:
            show(Console(), draw(frame))
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
        "router": None if frame.router is None else router.as_dict(frame.router),
        "slo": None if frame.slo is None else slo.as_dict(frame.slo),
        "decisions": [as_dict(one) for one in frame.decisions],
        "problems": list(frame.problems),
    }


def draw(frame: Snapshot) -> "Group":
    """One frame: a table of workers, a line about all of them, the last decisions, and problems."""
    from rich.console import Group
    from rich.text import Text

    from helios.cli.rows import Line, Rows

    left = ("worker", "model", "confidence")
    rows = Rows(
        *("worker", "model", "depth", "confidence", f"CBC/{WINDOW_TOKENS}"),
        *("tokens/s", "TPOT", "run", "wait"),
        left=left,
        note="not ready",
    )
    for worker in frame.workers:
        load, rates, plans = worker.telemetry, frame.rates(worker), plan_loads(worker)
        profiled = [frame.exit_profile(one.plan) for one in plans]
        pinned = (" pinned", "yellow") if frame.is_pinned(worker.worker_id) else ""
        rows.add(
            Text.assemble(worker.worker_id, pinned),
            "\n".join(one.plan.model for one in plans),
            "\n".join(str(one.plan.depth) for one in plans),
            "\n".join("-" if one is None else histogram(one.confidence_counts) for one in profiled),
            "-" if rates.cbc is None else f"{rates.cbc:.0f}",
            f"{rates.tokens_per_second:.0f}",
            "-" if rates.tpot_seconds is None else f"{1e3 * rates.tpot_seconds:.1f} ms",
            "\n".join(str(one.running) for one in plans),
            str(load.waiting),
            note="" if worker.ready else worker.reason or "no reason is known",
            style="" if worker.ready else "red",
        )
    rate = sum(frame.rates(worker).tokens_per_second for worker in frame.workers)
    streams = frame.status
    lines = [
        f"{rate:.0f} tokens/s, {streams.open_streams} streams open, {streams.queued_streams} wait for their "
        "first token",
        f"controller {frame.mode}"
        + (f", objective {slo.in_words(frame.slo)}" if frame.slo is not None else ", plans stay as they are"),
        *(router.in_words(frame.router) if frame.router is not None else ()),
        *(in_one_line(one) for one in reversed(frame.decisions)),
    ]
    problems = [Line(f"problem: {problem}", "red") for problem in frame.problems]
    return Group(rows, *map(Line, lines), *problems)
