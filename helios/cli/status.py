"""`helios status`: the workers' plans and confidences, the objective, and problems."""

import json
import time
from typing import TYPE_CHECKING, Any

import click

from helios.cli import router, slo
from helios.cli.decisions import as_dict, in_one_line
from helios.cli.snapshot import Snapshot, agreement_bars, histogram, observe, plan_loads
from helios.cli.target import target_option

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import RenderableType

    from helios.cli.rows import Rows
    from helios.history import ExitProfile


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@target_option("gateway")
@target_option("controller", "--controller")
@target_option("profiler", "--profiler")
def status(*, as_json: bool, target: str | None, controller: str | None, profiler: str | None) -> None:
    """Show workers, models, depths, confidence, load, objective, limits and problems."""
    with observe(target, controller, profiler) as stack:
        snapshot = stack.look(decisions=1)
    if as_json:
        click.echo(json.dumps(_as_json(snapshot), indent=2))
    else:
        _show(snapshot)


def _as_json(snapshot: Snapshot) -> dict[str, Any]:
    answer, limits, plan = snapshot.status, snapshot.status.limits, snapshot.plan
    return {
        "gateway": snapshot.gateway,
        "workers": [snapshot.worker_as_dict(worker) for worker in snapshot.workers],
        "open_streams": answer.open_streams,
        "queued_streams": answer.queued_streams,
        "limits": {field.name: getattr(limits, field.name) for field in limits.DESCRIPTOR.fields},
        "controller": (
            None
            if plan is None
            else {"mode": plan.mode, "leading": plan.leading, "next_assessment": plan.next_assessment}
        ),
        "router": None if snapshot.router is None else router.as_dict(snapshot.router),
        "slo": None if snapshot.slo is None else slo.as_dict(snapshot.slo),
        "last_decision": next((as_dict(decision) for decision in snapshot.decisions), None),
        "problems": list(snapshot.problems),
    }


def _show(snapshot: Snapshot) -> None:
    from rich.console import Console

    from helios.cli.rows import show

    show(Console(), *_parts(snapshot))


def _parts(snapshot: Snapshot) -> "Iterator[RenderableType]":
    from helios.cli.rows import Line

    yield _workers(snapshot)
    if exits := _served_exits(snapshot):
        yield _exits(snapshot, exits)
    objective = slo.in_words(snapshot.slo) if snapshot.slo is not None else "unknown"
    yield Line(f"objective: {objective}; controller: {_controller(snapshot)}")
    for line in router.in_words(snapshot.router) if snapshot.router is not None else ():
        yield Line(line)
    for decision in snapshot.decisions:
        yield Line(f"last decision: {in_one_line(decision)}")
    if snapshot.plan is not None and snapshot.plan.next_assessment:
        yield Line(f"candidates are evaluated again {snapshot.plan.next_assessment}")
    answer, limits = snapshot.status, snapshot.status.limits
    yield Line(
        f"gateway {snapshot.gateway}: {answer.open_streams} streams open (at most "
        f"{limits.max_open_streams}), {answer.queued_streams} wait for their first token (at most "
        f"{limits.max_queued_streams})"
    )
    yield Line(
        f"limits: prompt {limits.max_prompt_tokens} tokens, output {limits.max_tokens} tokens, "
        f"{limits.max_request_seconds:g} s a request"
    )
    for problem in snapshot.problems:
        yield Line(f"problem: {problem}", "red")


def _controller(snapshot: Snapshot) -> str:
    if snapshot.plan is None:
        return "none that answers, plans stay as they are"
    says = {
        "active": "chooses model and depth",
        "advisory": "decides and records, changes nothing",
        "off": "only obeys `helios pin`",
    }
    leads = "" if snapshot.plan.leading else "; it stands by, another one leads"
    return f"{snapshot.mode} ({says.get(snapshot.mode, 'of another version')}){leads}"


def _workers(snapshot: Snapshot) -> "Rows":
    from rich.text import Text

    from helios.cli.rows import Rows

    left = ("worker", "address", "state", "model")
    rows = Rows(*left, "depth", "run", "wait", "KV", "tokens", left=left, note="reason")
    for worker in snapshot.workers:
        load, plans = worker.telemetry, plan_loads(worker)
        state = Text("ready", "green") if worker.ready else Text("not ready", "red")
        if snapshot.is_pinned(worker.worker_id):
            state = Text.assemble(state, " ", ("pinned", "yellow"))
        used = load.blocks_total - load.blocks_free
        rows.add(
            worker.worker_id,
            worker.address,
            state,
            "\n".join(one.plan.model for one in plans),
            "\n".join(str(one.plan.depth) for one in plans),
            "\n".join(str(one.running) for one in plans),
            str(load.waiting),
            f"{used / load.blocks_total:.0%}" if load.blocks_total else "-",
            f"{load.generated_tokens:,}",
            note="" if worker.ready else worker.reason,
        )
    return rows


def _served_exits(snapshot: Snapshot) -> "dict[tuple[str, int], ExitProfile]":
    """The profiled exits of all plans in force, by model and depth."""
    plans = [load.plan for worker in snapshot.workers for load in plan_loads(worker)]
    found = {(plan.model, plan.depth): snapshot.exit_profile(plan) for plan in plans}
    return {key: one for key, one in sorted(found.items()) if one is not None}


def _exits(snapshot: Snapshot, exits: "Mapping[tuple[str, int], ExitProfile]") -> "Rows":
    """A table of the served exits with their last profile."""
    from rich.text import Text

    from helios.cli.rows import Rows

    left = ("exit", "confidence 0-1", "")
    rows = Rows(*left, "agree", "sure", "profiled", left=left)
    for (model, depth), one in exits.items():
        profile = snapshot.profiles[model]
        agreeing = agreement_bars(one.confidence_counts, one.agreement_counts)
        rows.add(
            f"{model} {depth}",
            Text.assemble(histogram(one.confidence_counts), "\n", (agreeing, "green")),
            "tokens\nagreeing",
            f"{one.agreement:.0%}",
            f"{one.share_above(one.threshold):.0%} (>= {one.threshold:.2f})",
            f"{max(0.0, time.time() - profile.time):.0f} s ago",
        )
    return rows
