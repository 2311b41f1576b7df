"""`helios bench`: the figures of the README, measured again."""

import click

from helios.cli.lazy_group import LazyGroup


@click.command(
    cls=LazyGroup,
    commands_at={
        "paper": "bench.commands.paper:paper",
        "serve": "bench.commands.serve:serve",
        "engine": "bench.commands.engine:engine",
        "prefill": "bench.commands.prefill:prefill",
        "served": "bench.commands.served:served",
    },
)
def bench() -> None:
    """Measure on this machine; each bench writes its figures with --json FILE."""
