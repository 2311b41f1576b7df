"""`helios decisions`: the controller's decisions, their options and their outcomes."""

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
    """A decision in the form of the JSON output."""
    # MessageToDict would turn 64-bit counters into strings.
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
    """The time of a decision, its reason and the chosen plan."""
    clock = time.strftime("%H:%M:%S", time.localtime(decision.time))
    return f"{decision.number} {clock} {decision.trigger}: {decision.reason}"


def _show(decision: controller_pb2.Decision, console: "Console") -> None:
    from helios.cli.rows import Line, Rows, show

    show(console, Line(in_one_line(decision), "bold"))
    outcome = decision.outcome
    if decision.HasField("outcome"):
        text = (
            f"outcome after {outcome.requests} requests, {outcome.seconds:.1f} s: "
            f"{outcome.tokens_per_second:.1f} tokens/s a worker, {outcome.high_exit_share:.0%} unsure; "
            f"reloads {outcome.reload_seconds:.2f} s, longest stall {1e3 * outcome.stall_seconds:.0f} ms, "
            f"{outcome.sequences_moved} sequences moved"
        )
        show(console, Line(text, indent="  "))
    if outcome.halted:
        show(console, Line(outcome.halted, "red", indent="  "))
    chosen = {(plan.model, plan.depth) for plan in decision.chosen if not plan.pinned}
    rows = Rows(
        *("model", "depth", "tokens/s", "TPOT ms", "ppl", "cost s"), left=("model",), names=2, note="refused"
    )
    for option in decision.options:
        rows.add(
            option.model,
            str(option.depth),
            f"{option.tokens_per_second:.0f}",
            f"{1e3 * option.tpot_seconds:.1f}",
            f"{option.perplexity_increase:+.1%}",
            f"{option.cost_seconds:.2f}",
            note=option.refused,
            style="green" if (option.model, option.depth) in chosen else "dim" if option.refused else "",
        )
    if decision.options:
        show(console, rows, "")
