"""A time limit on stopping. A process that exceeds it logs what it still waits for, and is ended."""

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
from queue import SimpleQueue
from types import FrameType

log = logging.getLogger(__name__)

# Exit status of a process that had to be ended, as with timeout(1).
EXIT_STATUS = 124
# The process ends this much later if it cannot even report what it waits for.
_LAST_SECONDS = 2.0

# Attributes with the frame and the awaited object, for coroutines, generators and asynchronous generators.
_AWAITING = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


class StopDeadline:
    """Ends its process, with EXIT_STATUS, if it has not ended by itself in time.

    It watches from its own thread. So it works even if a task ignores its cancellation, the event loop is
    blocked, or the interpreter waits for another thread at its end. If some code never releases the GIL,
    faulthandler ends the process with status 1.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """loop: its tasks are reported."""
        self._loop = loop
        self._is_set = False
        # Unlike threading's primitives, it is safe in a signal handler that interrupts any code.
        self._seconds: SimpleQueue[float] = SimpleQueue()
        threading.Thread(target=self._watch, name="stop-deadline", daemon=True).start()

    def set(self, seconds: float) -> None:
        """Sets the deadline to `seconds` from now. Only the first call counts. Safe in a signal handler."""
        if self._is_set:
            return
        self._is_set = True
        faulthandler.dump_traceback_later(seconds + _LAST_SECONDS, exit=True)
        self._seconds.put(seconds)

    def _watch(self) -> None:
        seconds = self._seconds.get()
        time.sleep(seconds)
        waits = "; ".join((*_tasks(self._loop), *_threads()))
        log.critical("has not stopped %g s after it was told to, and ends now. Left are: %s", seconds, waits)
        os._exit(EXIT_STATUS)


def _tasks(loop: asyncio.AbstractEventLoop) -> list[str]:
    """Each unfinished task, with the lines at which it waits, outermost first."""
    found = []
    for task in asyncio.all_tasks(loop):
        lines = []
        awaited: object = task.get_coro()
        while awaited is not None:
            frame, awaited = _step(awaited)
            lines += [_line(frame)] if frame is not None else []
        found.append(f"task {task.get_name()} at {' > '.join(lines) or 'its end'}")
    return sorted(found)


def _step(awaited: object) -> tuple[FrameType | None, object]:
    """The frame of an awaited object, and the object that this one awaits."""
    for frame, inner in _AWAITING:
        if hasattr(awaited, frame):
            return getattr(awaited, frame), getattr(awaited, inner)
    return None, None


def _threads() -> list[str]:
    """Each other live thread, with its current line."""
    frames = sys._current_frames()
    return [
        f"{'daemon ' if thread.daemon else ''}thread {thread.name} at {_line(frames[thread.ident])}"
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and thread.ident in frames
    ]


def _line(frame: FrameType) -> str:
    code = frame.f_code
    # Cython's frames, such as uvloop's, have neither globals nor a line.
    module, line = frame.f_globals.get("__name__", code.co_filename), frame.f_lineno or code.co_firstlineno
    return f"{module}:{line} ({code.co_qualname})"
