"""The CPU that profiling may take of the fleet's, and when the next evaluation is within it."""

import time
from collections.abc import Callable

# Urgent evaluations before all is paid off: several drifts in a row are followed, a plan that always breaches
# does not set the pace.
MOST_AHEAD = 3


class Allowance:
    """Spaces evaluations so that their CPU stays a share of the workers'.

    An evaluation is paid off over the time in which the share adds up to what it cost. Urgent ones may go
    before that, a few in all until everything is paid off.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """share: of the CPU of the workers' threads, in (0, 1]; 1 spaces nothing. clock: in seconds."""
        self._share = share
        self._clock = clock
        self._paid_at = clock()
        self._ahead = 0

    @property
    def wait_seconds(self) -> float:
        """Seconds until the next evaluation is within the share."""
        return max(0.0, self._paid_at - self._clock())

    def permits(self, *, urgent: bool) -> bool:
        """Whether an evaluation may begin now."""
        if self.wait_seconds == 0:
            self._ahead = 0
            return True
        if urgent and self._ahead < MOST_AHEAD:
            self._ahead += 1
            return True
        return False

    def spend(self, cpu_seconds: float, threads: int) -> None:
        """Takes in what an evaluation cost, and the threads that all workers have together."""
        if self._share < 1:
            self._paid_at = max(self._paid_at, self._clock()) + cpu_seconds / (self._share * max(1, threads))
