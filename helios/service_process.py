"""The process of a service: settings, logs and tracing set up, then served until it is told to stop."""

import faulthandler
import gc
import sys
from collections.abc import Callable, Coroutine
from typing import TypeVar

import uvloop

from helios import telemetry
from helios.errors import HeliosError, SettingsError
from helios.settings import ServiceSettings

_Settings = TypeVar("_Settings", bound=ServiceSettings)


def run(
    name: str,
    settings_type: type[_Settings],
    serve: Callable[[_Settings], Coroutine[None, None, int]],
    instance: Callable[[_Settings], str | None] = lambda _: None,
) -> int:
    """Runs `serve` on the process's settings and returns its exit code; 1 when it cannot start.

    `name` is the kind of service in logs and traces; `instance` tells two of a kind apart.
    """
    # A crash of native code leaves the stack it happened in.
    faulthandler.enable()
    try:
        settings = settings_type.from_command_line()
        telemetry.configure(f"helios-{name}", instance(settings) or "")
        settings.log_all()
        return uvloop.run(serve(settings))
    except HeliosError as error:
        what = "wrong settings: " if isinstance(error, SettingsError) else ""
        print(f"error: {what}{error}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        telemetry.shutdown()


def say_ready(address: str) -> None:
    """The one line on stdout that tells whoever started the process that it serves, and where.

    What is there now stays: the garbage collector leaves it alone from here on. To go through all of it takes
    a tenth of a second in a process with torch, in which no stream gets a token.
    """
    gc.collect()
    gc.freeze()
    print(f"ready address={address}", flush=True)  # noqa: T201
