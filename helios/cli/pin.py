"""`helios pin` and `helios unpin`: an operator holds workers at a plan, or releases them."""

from collections.abc import Iterable

import click

from helios.cli.target import target_option
from helios.controller_client import connect
from helios.v1 import controller_pb2


@click.command()
@click.option("--model", required=True, help="Name of a model in the workers' models directory.")
@click.option("--depth", required=True, type=click.IntRange(min=1), help="Layers to load, an exit layer.")
@click.option("--worker", "worker_id", default="", metavar="ID", help="Default: every worker.")
@target_option("controller")
def pin(*, model: str, depth: int, worker_id: str, target: str | None) -> None:
    """Reload to a model and depth and hold it; returns once it serves."""
    with connect(target) as controller:
        _show(controller.pin(model, depth, worker_id).plans)


@click.command()
@click.option("--worker", "worker_id", default="", metavar="ID", help="Default: every worker.")
@target_option("controller")
def unpin(*, worker_id: str, target: str | None) -> None:
    """Give plans back to the controller."""
    with connect(target) as controller:
        _show(controller.unpin(worker_id).plans)


def _show(plans: Iterable[controller_pb2.WorkerPlan]) -> None:
    for plan in plans:
        held = " (pinned)" if plan.pinned else ""
        click.echo(f"{plan.worker_id}: {plan.model} at depth {plan.depth}{held}")
