"""Measures the outcome of a decision, from the moment it is made."""

import time
from dataclasses import replace

from services.controller.fleet import Totals
from services.controller.record import OutcomeEntry
from services.controller.rollout import Progress


class Measurement:
    """The counters at the moment of a decision, and their growth since."""

    def __init__(self, number: int, totals: Totals, workers: int) -> None:
        self.number = number
        self._workers = workers
        self._began = time.monotonic()
        self._before = replace(totals)

    @property
    def seconds(self) -> float:
        """Seconds since the decision."""
        return max(time.monotonic() - self._began, 1e-6)

    def requests(self, totals: Totals) -> int:
        """Requests finished since the decision."""
        return totals.finished - self._before.finished

    def since(self, totals: Totals) -> Totals:
        """What all workers have done since the decision."""
        before = self._before
        return Totals(
            totals.finished - before.finished,
            totals.prefilled - before.prefilled,
            totals.generated - before.generated,
            totals.high_exit - before.high_exit,
        )

    def outcome(self, totals: Totals, progress: Progress) -> OutcomeEntry:
        """The outcome of the decision so far."""
        since, seconds = self.since(totals), self.seconds
        return OutcomeEntry(
            time=time.time(),
            seconds=seconds,
            requests=since.finished,
            tokens_per_second=since.generated / seconds / max(1, self._workers),
            high_exit_share=since.high_exit / since.generated if since.generated else 0.0,
            reload_seconds=progress.reload_seconds,
            stall_seconds=progress.stall_seconds,
            sequences_moved=progress.sequences_moved,
            halted=progress.halted,
        )
