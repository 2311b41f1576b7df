"""Keeps a child process running until it is told to stop."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path

from helios.errors import UnavailableError
from helios.tether import tethered

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 30.0
# After a child has run for this long, its next restart waits only for the shortest backoff.
STABLE_SECONDS = 30.0
LOG_BYTES = 10_000_000
LOG_FILES = 5
# How much of a process's log is kept in memory, to tell why it ended.
_REMEMBERED_LINES = 500
_REMEMBERED_CHARACTERS = 16_384
_READ_BYTES = 1 << 16
# A longer line is split.
_LINE_BYTES = 1 << 20
# A child can log this much while the supervisor is suspended (Ctrl-Z). Then it blocks.
_PIPE_BYTES = 1 << 20
_TRACEBACK = "Traceback (most recent call last)"
_ERROR = "error: "
_FATAL = "Fatal Python error: "


class Child:
    """One process. It is started, awaited until it reports that it is ready, and restarted when it ends.

    It runs in its own process group, so that Ctrl-C at the terminal reaches only the supervisor, which stops
    its children in order. It is tethered, so that it ends even if the supervisor gets SIGKILL.
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
        log_bytes: int = LOG_BYTES,
        log_files: int = LOG_FILES,
        on_line: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`ready_line` is searched in each line that the child writes. Its output goes to `log_path`.

        At `log_bytes` the log is renamed to `log_path` with `.1`, and a new one begins. `log_files` (at least
        2) are kept, including the current one. `on_change` is called whenever `pid` or `ready` has changed,
        `on_line` with each line of the log. `environment` is added to this process's environment.
        """
        self.name = name
        self.ready = asyncio.Event()
        self.log_path = log_path
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._ready_line = ready_line
        self._on_change = on_change
        self._on_line = on_line
        self._log = RotatingFileHandler(
            log_path, maxBytes=log_bytes, backupCount=log_files - 1, encoding="utf-8", delay=True
        )
        # The last lines of the current run.
        self._lines: deque[str] = deque(maxlen=_REMEMBERED_LINES)
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id. None while it does not run."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process and running else None

    def start(self) -> asyncio.Task[None]:
        """Starts it. The task ends after `stop`.

        The task fails with UnavailableError if the process ends before it was ever ready. The message gives
        the reason and the place of the log. The log of an earlier run is kept as the previous log file.
        """
        if self.log_path.exists() and self.log_path.stat().st_size:
            self._log.doRollover()
        self._task = asyncio.create_task(self._keep_running(), name=self.name)
        return self._task

    async def stop(self, grace_seconds: float) -> None:
        """Sends SIGTERM. After the grace period, sends SIGKILL to the whole process group."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._task is None:
            return
        _, late = await asyncio.wait({self._task}, timeout=grace_seconds)
        if late:
            log.warning("%s did not stop within %g s: killing it", self.name, grace_seconds)
            self.kill()
            await asyncio.wait({self._task})
        self._log.close()

    def kill(self) -> None:
        """Kills it and its process group at once, without a restart."""
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
            code = await self._run_once()
            if self._stopping.is_set():
                return
            why = f"{_describe(code)}: {self._reason(code)} (log: {self.log_path})"
            if not self.ready.is_set():
                raise UnavailableError(f"{self.name} ended while starting, {why}")
            if time.monotonic() - started > STABLE_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            log.warning("%s ended, %s; starting it again in %g s", self.name, why, backoff)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff):
                    await self._stopping.wait()
                return
            backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)

    async def _run_once(self) -> int:
        self._lines.clear()
        process = await asyncio.create_subprocess_exec(
            *tethered(self._command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            env={**os.environ, **self._environment},
            start_new_session=True,
            pipesize=_PIPE_BYTES,
        )
        self._process = process
        self._on_change()
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)
        assert process.stdout is not None
        reading = asyncio.create_task(self._read(process.stdout))
        code = await process.wait()
        # Kills processes that this one started, because they would keep its stdout open.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await reading
        self._on_change()
        return code

    async def _read(self, output: asyncio.StreamReader) -> None:
        begun = b""
        while chunk := await output.read(_READ_BYTES):
            *lines, begun = (begun + chunk).split(b"\n")
            if len(begun) > _LINE_BYTES:
                lines, begun = [*lines, begun], b""
            for line in lines:
                self._take(line.decode(errors="replace"))
        if begun:
            self._take(begun.decode(errors="replace"))

    def _take(self, line: str) -> None:
        """Handles one line that the process has written."""
        self._log.emit(logging.makeLogRecord({"msg": line}))
        self._lines.append(line[:_REMEMBERED_CHARACTERS])
        self._on_line(line)
        if not self.ready.is_set() and self._ready_line.search(line):
            log.info("%s is ready", self.name)
            self.ready.set()
            self._on_change()

    def _reason(self, code: int) -> str:
        if code == -signal.SIGKILL:
            # The process was killed before it could log a reason.
            return "memory may have run out (`dmesg` tells): start fewer workers, or a smaller model"
        return reason_of_end(self._lines)


def reason_of_end(lines: Iterable[str]) -> str:
    """Why a process ended, from its log: its last exception, else its last error, else its last line.

    An exception is the `error` of a JSON line, the line after a traceback, or a line that begins with `error:
    `. A cancellation counts only if there is nothing else, because something else has caused it.
    """
    exceptions, errors, rest = [], [], "it said nothing"
    in_traceback = False
    for line in lines:
        if in_traceback and not line.startswith((" ", "\t")):
            exceptions.append(line.strip())
            in_traceback = False
        elif line.startswith(_TRACEBACK):
            in_traceback = True
        elif line.startswith((_ERROR, _FATAL)):
            exceptions.append(line.removeprefix(_ERROR).strip())
        elif (record := _json_record(line)) is not None:
            message = str(record.get("message", line))
            if "error" in record:
                exceptions.append(str(record["error"]))
            elif record.get("level") in ("ERROR", "CRITICAL"):
                errors.append(message)
            rest = message
        elif not in_traceback and any(map(str.isalnum, line)):
            rest = line.strip()
    causes = [one for one in exceptions if not _is_cancellation(one)]
    return next((found[-1] for found in (causes, errors, exceptions) if found), rest)


def _json_record(line: str) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _is_cancellation(exception: str) -> bool:
    kind = exception.partition(":")[0].rpartition(".")[2]
    return kind in ("CancelledError", "KeyboardInterrupt", "SystemExit")


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    return f"killed by {signal.Signals(-code).name}"
