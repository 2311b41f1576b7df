"""Which gateway answers a prompt."""

import contextlib
from collections.abc import Iterator

import click

from helios import stack_state


@contextlib.contextmanager
def answering_gateway(target: str | None, model: str) -> Iterator[str]:
    """The address of the target, or else of the running stack's gateway.

    If no stack runs and a model is named, one that serves it is started for as long as the context lasts.
    Raises UnavailableError when no stack runs and none can be started, UnknownModelError for an unknown
    model.
    """
    if target or not model or stack_state.read(stack_state.state_dir()) is not None:
        yield stack_state.find_gateway(target, model)
        return
    from rich.console import Console

    from helios import catalog
    from helios.local_stack import local_stack

    # An unknown or broken model is reported at once.
    entry = catalog.find_model(catalog.find_models_dir(), model)
    with contextlib.ExitStack() as stack:
        with Console(stderr=True).status(f"no stack is running: starting one with {entry.name}"):
            own = stack.enter_context(local_stack("--model", entry.name, "--workers", "1"))
        click.secho(
            f"served by a stack for this command alone; `helios up --model {entry.name}` keeps one running",
            dim=True,
            err=True,
        )
        yield own.gateway
