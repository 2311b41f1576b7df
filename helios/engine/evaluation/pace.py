"""Paces background work: it rests after each piece so that others go first, and it can be stopped."""

import threading
import time

from helios.errors import CancelledError


class Pace:
    """Limits one thread's work to a share of a CPU. Any thread may call `stop`."""

    def __init__(self, cpu_share: float = 1.0) -> None:
        """cpu_share: in (0, 1]. At 1 the work never rests."""
        self._rest_per_second = 1 / cpu_share - 1
        self._stopped = threading.Event()
        self._worked: float | None = None

    def rest(self) -> None:
        """Sleeps in proportion to the CPU time since the last rest. Raises CancelledError once stopped."""
        worked = time.thread_time()
        since = 0.0 if self._worked is None else worked - self._worked
        if self._stopped.wait(since * self._rest_per_second):
            raise CancelledError("the work was cancelled before it ended")
        self._worked = worked

    def stop(self) -> None:
        """Makes the next `rest` raise CancelledError."""
        self._stopped.set()
