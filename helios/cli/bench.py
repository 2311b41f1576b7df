"""`helios bench`: the figures of the README, measured again."""

import click

from helios.cli.lazy_group import LazyGroup


@click.command(
    cls=LazyGroup,
    commands_at={
        "paper": "bench.paper:paper",
        "serve": "bench.serve:serve",
        "engine": "bench.engine:engine",
        "prefill": "bench.prefill:prefill",
        "served": "bench.served:served",
    },
)
def bench() -> None:
    """Measure on this machine; each bench writes its figures with --json FILE."""
