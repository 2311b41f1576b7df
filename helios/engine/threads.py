"""CPU threads of the engine's process.

They are global to the process, so whoever owns it (a service, a bench) gives them, with `set_threads`.
Loading and serving change nothing about them.
"""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from helios.engine.kernels.team import TEAM
from helios.modes import Precision

# Python's default of 5 ms would let the engine's thread keep the event loop waiting that long.
_SWITCH_SECONDS = 0.0005
# Threads of a load that nothing is served beside; more would only wait for memory.
_LOADING_THREADS = 4
# Added to the niceness of a load's thread while something is served beside it.
_LOADING_NICENESS = 10

# Until the process's owner gives threads: as many as torch takes, which OMP_NUM_THREADS bounds.
TEAM.threads = torch.get_num_threads()


def set_threads(threads: int, precision: str = Precision.AUTO, device: str = "cpu") -> None:
    """Gives `threads` CPU threads to what computes in `precision` on `device`: compiled code, or torch.

    Not to both: torch's threads spin for a while after each operation, when compiled code needs the cores.
    Also lets other Python threads run more often beside the engine's.
    """
    # As `weights.linear` packs what kernels compute.
    is_compiled = torch.device(device).type == "cpu" and precision != Precision.FLOAT16
    TEAM.threads = threads if is_compiled else 1
    torch.set_num_threads(1 if is_compiled else threads)
    sys.setswitchinterval(_SWITCH_SECONDS)


def get_threads() -> int:
    """CPU threads of computations."""
    return max(torch.get_num_threads(), TEAM.threads)


@contextmanager
def loading_threads(beside_serving: bool) -> Iterator[ThreadPoolExecutor]:
    """Threads that read and pack weights, each computing alone: one for each core, up to four.

    beside_serving: one thread, at a lower priority. After an error, work that has not begun is dropped.
    """
    count = 1 if beside_serving else min(_LOADING_THREADS, len(os.sched_getaffinity(0)))
    mine, begun = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # Only now has this thread its own number.
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
        # torch gives the number that was set last to threads that begin later: they get as many as before.
        torch.set_num_threads(mine)
        for one in beginning:
            one.result()
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
