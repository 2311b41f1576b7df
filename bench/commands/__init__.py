"""`helios bench`: the figures of the README, measured again."""

import click

from helios.cli.lazy_group import LazyGroup


@click.command(
    cls=LazyGroup,
    commands_at={
        "paper": "bench.paper.sections:paper",
        "serve": "bench.serving.serving_path:serve",
        "engine": "bench.engine.comparison:engine",
        "prefill": "bench.engine.prefill:prefill",
        "served": "bench.serving.comparison:served",
    },
)
def bench() -> None:
    """Measure on this machine; each bench writes its figures with --json FILE."""
