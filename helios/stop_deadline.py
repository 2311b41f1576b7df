"""A bound on stopping: a process that has not ended in time says what it still waits for, and ends."""

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

# Exit status of a process that had to be ended, the same as that of timeout(1).
EXIT_STATUS = 124
# How much later the process ends if it cannot even say what it waits for.
_LAST_SECONDS = 2.0

# Where coroutines, generators and asynchronous generators keep their frame, and what they await.
_AWAITING = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


class StopDeadline:
    """Ends its process, with EXIT_STATUS, when it has not ended by itself in time.

    It watches from a thread. So it works even if a task refuses its cancellation, the event loop is blocked,
    or the interpreter waits at its end for another thread. If some code never releases the interpreter's
    lock, faulthandler ends the process with status 1.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the one whose tasks are reported."""
        self._loop = loop
        self._is_set = False
        # Unlike the primitives of threading, it can be used in a signal handler, whatever that interrupts.
        self._seconds: SimpleQueue[float] = SimpleQueue()
        threading.Thread(target=self._watch, name="stop-deadline", daemon=True).start()

    def set(self, seconds: float) -> None:
        """The process has `seconds` from now. Only the first call counts. Safe in a signal handler."""
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
    """Each task that has not ended, with the lines at which it waits, outermost first."""
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
    """The frame of an awaited object, and what that awaits in turn."""
    for frame, inner in _AWAITING:
        if hasattr(awaited, frame):
            return getattr(awaited, frame), getattr(awaited, inner)
    return None, None


def _threads() -> list[str]:
    """Each other thread that lives, with its line."""
    frames = sys._current_frames()
    return [
        f"{'daemon ' if thread.daemon else ''}thread {thread.name} at {_line(frames[thread.ident])}"
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and thread.ident in frames
    ]


def _line(frame: FrameType) -> str:
    code = frame.f_code
    # Cython's frames, as uvloop's, have neither globals nor a line.
    module, line = frame.f_globals.get("__name__", code.co_filename), frame.f_lineno or code.co_firstlineno
    return f"{module}:{line} ({code.co_qualname})"
