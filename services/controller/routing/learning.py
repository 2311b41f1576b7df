"""Decides when more requests are evaluated for the router. Pure: no IO and no clock."""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping

from services.controller.agenda import Evaluate
from services.controller.allowance import Allowance
from services.controller.routing.recent_prompts import Seen

# The first evaluations, each of as many requests as have come since the one before.
_FIRST = (8, 16, 32)
# Requests of every later evaluation.
_MORE = 8
# Traffic is new if so many of the last routed prompts are unlike all examples.
_UNLIKE, _OF_LAST = 4, 6
# A kind of traffic matters if it makes up a third of the last prompts. While it lacks examples, requests are
# evaluated at intervals of so many.
_KINDS_OF_LAST, _KIND_SHARE = 16, 1 / 3
_GROWTH_REQUESTS = 24
# Delay before a failed evaluation is tried again.
_RETRY_SECONDS = 10.0


class Learning:
    """Says when to evaluate for the router. Its owner does so and reports back."""

    def __init__(self, growth: int, allowance: Allowance) -> None:
        """growth: examples that are wanted of each kind of traffic. allowance: shared with all profiling."""
        self._growth = growth
        self._allowance = allowance
        # How many of the first evaluations have been made. None: it is not known what there is already.
        self._made: int | None = None
        # Count of finished requests at the last evaluation.
        self._evaluated_at = 0
        self._retry_at = -math.inf
        self._unlike: deque[bool] = deque(maxlen=_OF_LAST)
        self._kinds: deque[str] = deque(maxlen=_KINDS_OF_LAST)

    def saw(self, prompts: Iterable[Seen]) -> None:
        """Takes in routed prompts, the newest last."""
        for prompt in prompts:
            self._unlike.append(prompt.is_unlike)
            self._kinds.append(prompt.kind)

    def traffic_changed(self) -> None:
        """Notes that other traffic has come. If it is routed, `saw` shows that already."""
        self._unlike.extend([True] * _OF_LAST)

    def due(self, finished: int, now: float, examples: int, of_kind: Mapping[str, int]) -> Evaluate | None:
        """The evaluation that is due. None: none is.

        finished: count of finished requests. now: seconds. examples: how many there are. of_kind: how many of
        each kind, by the model that reads them best.
        """
        if now < self._retry_at:
            return None
        if self._made is None:
            # A controller that begins to lead goes on with the examples that there are.
            self._made = sum(examples >= sum(_FIRST[: count + 1]) for count in range(len(_FIRST)))
        waited = finished - self._evaluated_at
        if self._made < len(_FIRST):
            wanted = _FIRST[self._made]
            return Evaluate(requests=wanted, for_router=True) if waited >= wanted else None
        if sum(self._unlike) >= _UNLIKE:
            return Evaluate(requests=_MORE, fresh=True, for_router=True)
        lacks = waited >= _GROWTH_REQUESTS and self._lacks(of_kind)
        if lacks or (waited >= _MORE and self._allowance.permits(urgent=False)):
            return Evaluate(requests=_MORE, for_router=True)
        return None

    def began(self, finished: int, now: float) -> None:
        """Notes that an evaluation has begun."""
        self._evaluated_at = finished
        self._retry_at = now + _RETRY_SECONDS
        # Only prompts that come after it may be found unlike what it learns.
        self._unlike.clear()

    def ended(self, cpu_seconds: float, threads: int, *, failed: bool) -> None:
        """Notes that an evaluation has ended. A failed one is tried again after a while."""
        self._allowance.spend(cpu_seconds, threads)
        if not failed:
            self._retry_at = -math.inf
            self._made = (self._made or 0) + 1

    def in_words(self, finished: int) -> str:
        """When the next evaluation is due."""
        made = self._made or 0
        wanted = _FIRST[made] if made < len(_FIRST) else _MORE
        left = max(0, wanted - (finished - self._evaluated_at))
        if made < len(_FIRST):
            return f"for the router in {left} requests"
        wait = self._allowance.wait_seconds
        return f"for the router in {left} requests" + (f", and not within {wait:.0f} s" if wait else "")

    def _lacks(self, of_kind: Mapping[str, int]) -> bool:
        """Whether a kind that is served now has too few examples."""
        counts = Counter(self._kinds)
        return any(
            count >= _KIND_SHARE * _KINDS_OF_LAST and of_kind.get(kind, 0) < self._growth
            for kind, count in counts.items()
        )
