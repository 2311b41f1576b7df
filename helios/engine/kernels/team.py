"""Threads that compute one compiled call together.

Not torch's OpenMP threads: what is compiled cannot reach them on every machine, and a team meets at
barriers inside the call, so it is woken once a call instead of once a product.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np

Kernel = Callable[..., None]

# Multiply-adds of a call from which on several threads are faster than one that need not wake the others and
# wait for them: what one thread does in half a millisecond.
_WORTHWHILE = 32 << 20


class Team:
    """`threads` threads, the caller's own among them (`threads.lend`). One call at a time."""

    def __init__(self) -> None:
        self.threads = 1
        # Multiply-adds below which the caller's thread works alone. The results are the same.
        self.worthwhile = _WORTHWHILE
        # That callers have spent in compiled calls.
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._members: list[_Member] = []
        # Where the threads meet (`kernels._meet`): how many have come, and how often they met.
        self._meeting = np.zeros(2, dtype=np.int64)

    def run(self, kernel: Kernel, *arguments: Any, operations: int) -> None:
        """Calls kernel(thread, threads, team, *arguments) on every thread; returns when all are done.

        operations: multiply-adds of the call, about.
        """
        began, threads = time.perf_counter(), self.threads if operations >= self.worthwhile else 1
        if threads == 1:
            kernel(0, 1, 0, *arguments)
        else:
            self._run_together(kernel, threads, arguments)
        self.seconds += time.perf_counter() - began

    def _run_together(self, kernel: Kernel, threads: int, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            while len(self._members) < threads - 1:
                self._members.append(_Member(len(self._members) + 1))
            team = self._meeting.ctypes.data
            for member in self._members[: threads - 1]:
                member.begin(kernel, threads, team, arguments)
            kernel(0, threads, team, *arguments)
            for member in self._members[: threads - 1]:
                member.done.get()


class _Member:
    """A thread that waits for its part of the next call."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._calls: SimpleQueue[tuple[Kernel, int, int, tuple[Any, ...]]] = SimpleQueue()
        self.done: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._work, name=f"team-{number}", daemon=True).start()

    def begin(self, kernel: Kernel, threads: int, team: int, arguments: tuple[Any, ...]) -> None:
        """Hands over a call; `done` gets an entry at its end."""
        self._calls.put((kernel, threads, team, arguments))

    def _work(self) -> None:
        while True:
            kernel, threads, team, arguments = self._calls.get()
            kernel(self._number, threads, team, *arguments)
            self.done.put(None)


TEAM = Team()
