"""Options that name a server. Its address is checked before anything connects to it."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

from helios import address

_Command = TypeVar("_Command", bound=Callable[..., Any])

_VARIABLES = {
    "gateway": "HELIOS_TARGET",
    "controller": "HELIOS_CONTROLLER_TARGET",
    "profiler": "HELIOS_PROFILER_TARGET",
}


class Address(click.ParamType[str]):
    """host:port. `any_port` allows port 0, for a server that takes any free port."""

    name = "address"

    def __init__(self, *, any_port: bool = False) -> None:
        self._any_port = any_port

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns a valid address unchanged. Anything else is a usage error."""
        try:
            address.parse(str(value), any_port=self._any_port)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def target_option(
    service: Literal["gateway", "controller", "profiler"], flag: str = "--target"
) -> Callable[[_Command], _Command]:
    """The option with which a command talks to a service other than the running stack's."""
    return click.option(
        flag,
        envvar=_VARIABLES[service],
        show_envvar=True,
        type=Address(),
        metavar="HOST:PORT",
        help=f"A {service}. Default: the running stack's.",
    )
