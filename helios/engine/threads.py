"""CPU threads of the engine's process."""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from helios.engine.kernels.team import TEAM

# Python's default of 5 ms would let the engine's thread keep the event loop waiting that long.
_SWITCH_SECONDS = 0.0005
# Threads of a load that nothing runs beside; more would wait for the memory.
_LOADING_THREADS = 4
# How far the thread of a load stands back behind what serves beside it.
_LOADING_NICENESS = 10


def set_threads(threads: int) -> None:
    """Gives computations `threads` CPU threads, and lets other Python threads run in between."""
    torch.set_num_threads(threads)
    TEAM.threads = 1
    sys.setswitchinterval(_SWITCH_SECONDS)


def get_threads() -> int:
    """CPU threads of computations."""
    return max(torch.get_num_threads(), TEAM.threads)


def lend(compiled: bool) -> None:
    """Gives the threads to what computes: the team of compiled code, or torch.

    Not to both: torch's spin for a while after each operation, where a team's next call is to run.
    """
    threads = get_threads()
    TEAM.threads = threads if compiled else 1
    torch.set_num_threads(1 if compiled else threads)


@contextmanager
def loading_threads(beside_serving: bool) -> Iterator[ThreadPoolExecutor]:
    """Threads that read and pack weights, each computing alone: one for each core, up to four.

    beside_serving: one that stands back. At an error what has not begun is given up.
    """
    count = 1 if beside_serving else min(_LOADING_THREADS, len(os.sched_getaffinity(0)))
    mine, begun = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # Only now has this thread a number of its own.
        begun.wait()
        if beside_serving:
            # On Linux each thread has its own niceness.
            thread = threading.get_native_id()
            niceness = os.getpriority(os.PRIO_PROCESS, thread) + _LOADING_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, niceness)

    threads = ThreadPoolExecutor(count, thread_name_prefix="loading")
    try:
        beginning = [threads.submit(begin) for _ in range(count)]
        begun.wait()
        # It is also what threads that begin later get, and they are to have as many as before.
        torch.set_num_threads(mine)
        for one in beginning:
            one.result()
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
