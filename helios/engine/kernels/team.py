"""Threads that compute one compiled call together.

They are not torch's OpenMP threads, because compiled code cannot reach those on every machine. The threads
meet at barriers inside the call, so they are woken once per call instead of once per product.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np

from helios.engine.kernels.layout import ALONE, Thread

Kernel = Callable[..., None]

# With at least this many multiply-adds in a call, several threads are faster than one, although they must be
# woken and waited for. One thread computes this many in half a millisecond.
_WORTHWHILE = 32 << 20
_ALONE = tuple(ALONE)


class Team:
    """`threads` threads, including the caller's. One call at a time."""

    def __init__(self) -> None:
        self.threads = 1
        # With fewer multiply-adds the caller's thread works alone. The results are the same.
        self.worthwhile = _WORTHWHILE
        # Total seconds in compiled calls.
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._members: list[_Member] = []
        # The barrier (`barrier.meet`): how many threads have arrived, and how often they have met.
        self._meeting = np.zeros(2, dtype=np.int64)

    def run(self, kernel: Kernel, *arguments: Any, operations: int) -> None:
        """Calls kernel(thread, *arguments) on every thread. Returns when all are done.

        kernel: a function of `border`, which describes how arguments cross; operations: approximate number of
        multiply-adds of the call.
        """
        began, threads = time.perf_counter(), self.threads if operations >= self.worthwhile else 1
        if threads == 1:
            kernel(_ALONE, *arguments)
        else:
            self._run_together(kernel, threads, arguments)
        self.seconds += time.perf_counter() - began

    def _run_together(self, kernel: Kernel, threads: int, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            while len(self._members) < threads - 1:
                self._members.append(_Member(len(self._members) + 1))
            barrier = self._meeting.ctypes.data
            for number, member in enumerate(self._members[: threads - 1], 1):
                member.begin(kernel, Thread(number, threads, barrier), arguments)
            kernel(tuple(Thread(0, threads, barrier)), *arguments)
            for member in self._members[: threads - 1]:
                member.done.get()


class _Member:
    """A thread that waits for its part of the next call."""

    def __init__(self, number: int) -> None:
        self._calls: SimpleQueue[tuple[Kernel, Thread, tuple[Any, ...]]] = SimpleQueue()
        self.done: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._work, name=f"team-{number}", daemon=True).start()

    def begin(self, kernel: Kernel, thread: Thread, arguments: tuple[Any, ...]) -> None:
        """Starts this thread's part of a call. `done` gets an entry at its end."""
        self._calls.put((kernel, thread, arguments))

    def _work(self) -> None:
        while True:
            kernel, thread, arguments = self._calls.get()
            kernel(tuple(thread), *arguments)
            self.done.put(None)


TEAM = Team()
