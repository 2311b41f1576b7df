"""Limits profiling to a share of the fleet's CPU, and tells when the next evaluation fits into it."""

import time
from collections.abc import Callable

# Most urgent evaluations before all costs are paid off. Several drifts in a row can be followed, but a plan
# that always breaches cannot cause endless evaluations.
MOST_AHEAD = 3


class Allowance:
    """Spaces evaluations so that their CPU time stays a share of the workers'.

    An evaluation is paid off once the share has accumulated to its cost. A few urgent ones may begin earlier.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """share: of the workers' CPU threads, in (0, 1]; 1: no spacing. clock: in seconds."""
        self._share = share
        self._clock = clock
        self._paid_at = clock()
        self._ahead = 0

    @property
    def wait_seconds(self) -> float:
        """Seconds until the next evaluation fits into the share."""
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
        """Adds the cost of an evaluation. `threads`: of all workers together."""
        if self._share < 1:
            self._paid_at = max(self._paid_at, self._clock()) + cpu_seconds / (self._share * max(1, threads))
