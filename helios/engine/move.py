"""A reload between two steps: the plan that takes over, and the sequences that move to it."""

import threading
import time
from dataclasses import dataclass, field

from helios.engine.plan import Plan
from helios.engine.scheduling.sequence import Sequence
from helios.errors import HeliosError, UnavailableError


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did: bytes read, and sequences that go on under the new plan.

    stall_seconds: the longest that one of them went without a token, up to its first under the new plan.
    """

    bytes_read: int
    sequences_moved: int
    stall_seconds: float


@dataclass(slots=True)
class Swap:
    """A plan that waits for the end of a step, then for the sequences in flight to move to it.

    before: the plan that it comes after. `done` is set when nobody is under that one any more.
    """

    plan: Plan
    before: Plan
    done: threading.Event = field(default_factory=threading.Event)
    result: Reloaded | HeliosError = field(
        default_factory=lambda: UnavailableError("the engine stopped before all were under the new plan")
    )
    moved: int = 0
    stall_seconds: float = 0.0
    # When each sequence that has no token under the new plan yet got its last one, on time.monotonic's clock.
    waiting: dict[Sequence, float] = field(default_factory=dict)

    def note_tokens(self, readers: list[Sequence], *, moved: bool) -> None:
        """Takes in who got a token now; moved: under the new plan."""
        now = time.monotonic()
        for seq in readers:
            if (before := self.waiting.pop(seq, None)) is not None:
                self.stall_seconds = max(self.stall_seconds, now - before)
                if not moved:
                    self.waiting[seq] = now

    def end(self) -> None:
        """Lets go of whoever waits for the reload."""
        self.result = Reloaded(self.plan.bytes_read, self.moved, self.stall_seconds)
        self.done.set()
