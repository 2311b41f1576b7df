"""Decides which streams are admitted: limits on open streams and on streams waiting for a first token."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from helios.errors import OverloadedError
from services.gateway.settings import GatewaySettings

_SHORTEST_HINT_SECONDS = 0.05


class EventRate:
    """The rate of an event: a count in which every occurrence fades over `window_seconds`."""

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._count = 0.0
        self._counted_at = 0.0

    def observe(self, now: float, occurrences: int = 1) -> None:
        """Records one occurrence, or several at once."""
        self._count = self._faded(now) + occurrences
        self._counted_at = now

    def seconds_between(self, now: float) -> float | None:
        """Estimated time between two occurrences. None before the first. It grows while nothing happens."""
        count = self._faded(now)
        return self._window_seconds / count if count > 0 else None

    def _faded(self, now: float) -> float:
        return self._count * math.exp((self._counted_at - now) / self._window_seconds)


class Place:
    """One admitted stream. It is queued until its first token, and open until it ends."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self._queued = True

    def first_token(self) -> None:
        """Notes that the stream no longer waits. Later calls change nothing."""
        if self._queued:
            self._queued = False
            self._admission.left_queue()

    @property
    def queued(self) -> bool:
        """Whether the stream still waits for its first token."""
        return self._queued


class Admission:
    """Counts open and queued streams, and refuses those above the limits."""

    def __init__(self, settings: GatewaySettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._ends = EventRate(settings.rate_window_seconds)
        self._starts = EventRate(settings.rate_window_seconds)
        self.open_streams = 0
        self.queued_streams = 0

    @contextmanager
    def admit(self) -> Iterator[Place]:
        """A place for one stream, released when the block ends.

        Raises OverloadedError when a limit is reached. Its retry hint comes from the rate at which places
        have become free.
        """
        settings = self._settings
        if self.queued_streams >= settings.max_queued_streams:
            raise OverloadedError(
                f"{self.queued_streams} streams wait for their first token, which is this gateway's limit; "
                "retry after the hinted time",
                self._hint(self._starts),
            )
        if self.open_streams >= settings.max_open_streams:
            raise OverloadedError(
                f"{self.open_streams} streams are open, which is this gateway's limit; "
                "retry after the hinted time",
                self._hint(self._ends),
            )
        self.open_streams += 1
        self.queued_streams += 1
        place = Place(self)
        try:
            yield place
        finally:
            place.first_token()
            self.open_streams -= 1
            self._ends.observe(self._clock())

    def left_queue(self) -> None:
        """Notes that one stream no longer waits for its first token."""
        self.queued_streams -= 1
        self._starts.observe(self._clock())

    def _hint(self, rate: EventRate) -> float:
        """Seconds until a place will probably be free."""
        seconds = rate.seconds_between(self._clock())
        if seconds is None:
            return self._settings.overload_retry_seconds
        return min(max(seconds, _SHORTEST_HINT_SECONDS), self._settings.max_retry_seconds)
