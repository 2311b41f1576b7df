"""CPU threads of the engine's process.

They are global to the process, so the owner of the process (a service, a bench) sets them with `set_threads`.
Loading and serving do not change their number.
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

# With Python's default of 5 ms the engine's thread could keep the event loop waiting that long.
_SWITCH_SECONDS = 0.0005
# Threads of a load while nothing is served. More would only wait for memory.
_LOADING_THREADS = 4
# Added to the niceness of a load's thread while a plan is served.
_LOADING_NICENESS = 10

# Before `set_threads` is called: torch's default, which OMP_NUM_THREADS limits.
TEAM.threads = torch.get_num_threads()


def set_threads(threads: int, precision: str = Precision.AUTO, device: str = "cpu") -> None:
    """Gives `threads` CPU threads to compiled code or torch, whichever uses `precision` on `device`.

    Not to both, because torch's threads spin for a while after each operation, when compiled code needs the
    cores. Also lets other Python threads run more often beside the engine's thread.
    """
    # The same condition as in `weights.linear`, which packs weights for kernels.
    is_compiled = torch.device(device).type == "cpu" and precision != Precision.FLOAT16
    TEAM.threads = threads if is_compiled else 1
    torch.set_num_threads(1 if is_compiled else threads)
    sys.setswitchinterval(_SWITCH_SECONDS)


def get_threads() -> int:
    """Number of CPU threads that compute."""
    return max(torch.get_num_threads(), TEAM.threads)


@contextmanager
def loading_threads(beside_serving: bool) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that read and pack weights, each computing alone: one per core, up to four.

    beside_serving: use one thread with a lower priority. After an error, work that has not begun is dropped.
    """
    count = 1 if beside_serving else min(_LOADING_THREADS, len(os.sched_getaffinity(0)))
    mine, begun = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # torch gives this thread its own thread count only at this call.
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
        # torch gives later threads the count that was set last, so the earlier count is restored here.
        torch.set_num_threads(mine)
        for one in beginning:
            one.result()
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
