"""`helios decisions`: what the controller decided, what it weighed, and what came of it."""

import json
import time
from typing import TYPE_CHECKING, Any

import click

from helios.cli.target import target_option
from helios.controller_client import connect
from helios.v1 import controller_pb2

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.option("--last", type=click.IntRange(0, 1000), default=10, show_default=True, help="How many.")
@click.option("--follow", is_flag=True, help="Go on with new ones until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="As a JSON list; with --follow one object a line.")
@target_option("controller")
def decisions(*, last: int, follow: bool, as_json: bool, target: str | None) -> None:
    """Read the decision record: trigger, options with their costs, choice, outcome."""
    from rich.console import Console

    console = Console()
    with connect(target) as controller:
        found = controller.decisions(last, follow=follow)
        if as_json and not follow:
            click.echo(json.dumps([as_dict(one) for one in found], indent=2))
            return
        for one in found:
            if as_json:
                click.echo(json.dumps(as_dict(one)))
            else:
                _show(one, console)


def as_dict(decision: controller_pb2.Decision) -> dict[str, Any]:
    """A decision as JSON has it."""
    # Not MessageToDict: it makes strings of 64-bit counters.
    outcome = decision.outcome
    return {
        "number": decision.number,
        "time": decision.time,
        "trigger": decision.trigger,
        "chosen": [
            {name: getattr(one, name) for name in ("worker_id", "model", "depth", "pinned")}
            for one in decision.chosen
        ],
        "reason": decision.reason,
        "options": [
            {field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields}
            for one in decision.options
        ],
        "outcome": (
            {field.name: getattr(outcome, field.name) for field in outcome.DESCRIPTOR.fields}
            if decision.HasField("outcome")
            else None
        ),
    }


def in_one_line(decision: controller_pb2.Decision) -> str:
    """When, why and what."""
    clock = time.strftime("%H:%M:%S", time.localtime(decision.time))
    return f"{decision.number} {clock} {decision.trigger}: {decision.reason}"


def _show(decision: controller_pb2.Decision, console: "Console") -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console.print(escape(in_one_line(decision)), style="bold", highlight=False)
    outcome = decision.outcome
    if decision.HasField("outcome"):
        console.print(
            f"  outcome after {outcome.requests} requests, {outcome.seconds:.1f} s: "
            f"{outcome.tokens_per_second:.1f} tokens/s a worker, {outcome.high_exit_share:.0%} unsure; "
            f"reloads {outcome.reload_seconds:.2f} s, longest stall {1e3 * outcome.stall_seconds:.0f} ms, "
            f"{outcome.sequences_moved} sequences moved",
            highlight=False,
        )
    if outcome.halted:
        console.print(f"  [red]{escape(outcome.halted)}[/]", highlight=False)
    chosen = {(plan.model, plan.depth) for plan in decision.chosen if not plan.pinned}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("model", "depth", "tokens/s", "TPOT ms", "ppl", "cost s"):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_column("refused", overflow="fold")
    for option in decision.options:
        style = "green" if (option.model, option.depth) in chosen else "dim" if option.refused else ""
        table.add_row(
            option.model,
            str(option.depth),
            f"{option.tokens_per_second:.0f}",
            f"{1e3 * option.tpot_seconds:.1f}",
            f"{option.perplexity_increase:+.1%}",
            f"{option.cost_seconds:.2f}",
            escape(option.refused),
            style=style,
        )
    if decision.options:
        console.print(table)
