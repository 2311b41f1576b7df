"""Runs the process of a service: sets up settings, logs and tracing, then serves until told to stop."""

import asyncio
import faulthandler
import gc
import logging
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TypeVar

import uvloop

from helios import telemetry
from helios.errors import HeliosError, SettingsError
from helios.settings import ServiceSettings
from helios.stop_deadline import StopDeadline

log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_Settings = TypeVar("_Settings", bound=ServiceSettings)


def run(
    name: str,
    settings_type: type[_Settings],
    serve: Callable[[_Settings], Coroutine[None, None, int]],
    instance: Callable[[_Settings], str | None] = lambda _: None,
) -> int:
    """Runs `serve` with the process's settings and returns its exit code, or 1 when it cannot start.

    `name` is the kind of service in logs and traces. `instance` distinguishes services of one kind.
    """
    # After a crash of native code, the stack at the crash is printed.
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
    """Prints the one line on stdout that tells the parent process that this service is ready, and where.

    From here on the garbage collector skips all objects that exist now. In a process with torch, a pass over
    them takes a tenth of a second in which no stream gets a token.
    """
    gc.collect()
    gc.freeze()
    print(f"ready address={address}", flush=True)  # noqa: T201


class StopSignal:
    """Catches SIGTERM and SIGINT once created. Create it before reporting that the service is ready."""

    def __init__(self, stop_seconds: float) -> None:
        """stop_seconds: longest time from signal to end of the process, grace included (StopDeadline)."""
        self._seconds = stop_seconds
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self._deadline = StopDeadline(self._loop)
        for number in _STOP_SIGNALS:
            # The event loop's own handlers could not set the deadline while the loop is blocked.
            signal.signal(number, self._take)

    async def wait(self) -> None:
        """Returns when the signal comes. A second signal ends the process at once.

        The deadline is also set when the wait is cancelled, because then the service stops for another
        reason.
        """
        try:
            await self._came.wait()
        finally:
            self._deadline.set(self._seconds)
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        log.info("stopping")

    def _take(self, *_: object) -> None:
        self._deadline.set(self._seconds)
        self._loop.call_soon_threadsafe(self._came.set)
