"""A child process that is kept running until it is told to stop."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from helios.errors import UnavailableError
from helios.tether import tethered

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 30.0
# A child that lived this long starts again with the first backoff.
STABLE_SECONDS = 30.0
_LAST_WORDS_BYTES = 16_384
_LINE_LIMIT = 1 << 20


class Child:
    """One process: started, awaited until it says that it is ready, started again when it ends.

    It runs in its own process group, so that Ctrl-C at the terminal reaches only the supervisor, which
    stops its children in order; and tethered, so that not even SIGKILL of the supervisor leaves it behind.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        ready_line: re.Pattern[str],
        log_path: Path,
        on_change: Callable[[], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`ready_line` is searched in each line of stdout; stdout and stderr go to `log_path`.

        `on_change` is called whenever `pid` or `ready` has changed; `environment` adds to what this one has.
        """
        self.name = name
        self.ready = asyncio.Event()
        self.log_path = log_path
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._ready_line = ready_line
        self._on_change = on_change
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process and running else None

    @property
    def is_started(self) -> bool:
        """Whether `start` was called; before that, its log is of an earlier run."""
        return self._task is not None

    def start(self) -> asyncio.Task[None]:
        """Starts it. The task ends after `stop`.

        It fails with UnavailableError when the process ends before it was ever ready; the message
        carries the last thing that the process said.
        """
        self.log_path.write_bytes(b"")
        self._task = asyncio.create_task(self._keep_running(), name=self.name)
        return self._task

    async def stop(self, grace_seconds: float) -> None:
        """SIGTERM, and SIGKILL to its whole group once the grace is over."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._task is None:
            return
        _, late = await asyncio.wait({self._task}, timeout=grace_seconds)
        if late:
            log.warning("%s did not stop within %g s: killing it", self.name, grace_seconds)
            self.kill()
            await asyncio.wait({self._task})

    def kill(self) -> None:
        """Ends it and its whole group at once, for good."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def _keep_running(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            started = time.monotonic()
            offset = self.log_path.stat().st_size
            code = await self._run_once()
            if self._stopping.is_set():
                return
            if not self.ready.is_set():
                words = last_words(self.log_path, offset)
                raise UnavailableError(
                    f"{self.name} ended while starting ({_describe(code)}): {words} (log: {self.log_path})"
                )
            if time.monotonic() - started > STABLE_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            # A process that was killed had no time for words.
            words = f": {last_words(self.log_path, offset)}" if code > 0 else ""
            log.warning(
                "%s ended (%s)%s; starting it again in %g s", self.name, _describe(code), words, backoff
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff):
                    await self._stopping.wait()
                return
            backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)

    async def _run_once(self) -> int:
        with self.log_path.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                *tethered(self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=PIPE,
                stderr=sink,
                env={**os.environ, **self._environment},
                start_new_session=True,
                limit=_LINE_LIMIT,
            )
            self._process = process
            self._on_change()
            if self._stopping.is_set():
                self._signal(signal.SIGTERM)
            assert process.stdout is not None
            reading = asyncio.create_task(self._read(process.stdout, sink))
            code = await process.wait()
            # What the process may have started, and what would hold its stdout open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await reading
        self._on_change()
        return code

    async def _read(self, stdout: asyncio.StreamReader, sink: BinaryIO) -> None:
        async for line in stdout:
            sink.write(line)
            sink.flush()
            if not self.ready.is_set() and self._ready_line.search(line.decode(errors="replace")):
                log.info("%s is ready", self.name)
                self.ready.set()
                self._on_change()


def last_words(log_path: Path, offset: int = 0) -> str:
    """The message of the last line of a log, written after `offset`; JSON lines give their message."""
    with log_path.open("rb") as source:
        end = source.seek(0, os.SEEK_END)
        source.seek(max(offset, end - _LAST_WORDS_BYTES))
        lines = source.read().decode(errors="replace").strip().splitlines()
    if not lines:
        return "it said nothing"
    last = lines[-1].strip()
    try:
        record = json.loads(last)
    except ValueError:
        return last.removeprefix("error: ")
    if not isinstance(record, dict):
        return last
    if exception := record.get("exception"):
        return str(exception).strip().splitlines()[-1]
    return str(record.get("message") or last)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    return f"killed by {signal.Signals(-code).name}"
