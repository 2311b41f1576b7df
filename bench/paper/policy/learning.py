"""When a router that learns while it serves has requests evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Learnt:
    """What is known after a request.

    served: number of requests so far. unlike: for the latest ones whether they were unlike all that is known.
    kinds: for the latest ones the model that is expected to read them best. examples: number of examples
    that each model reads best.
    """

    served: int
    unlike: Sequence[bool]
    kinds: Sequence[int]
    examples: Sequence[int]


class Learning(Protocol):
    """Says when requests are evaluated, and how many."""

    def due(self, known: Learnt) -> int:
        """The number of the newest requests that are evaluated now."""
        ...


@dataclass(slots=True)
class Schedule:
    """Evaluates after fixed numbers of requests, when requests are unlike all, and while examples are few."""

    first: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of requests after which all new ones are evaluated."""
    group: int = 8
    """Requests of a later evaluation."""
    unlike: tuple[int, int] = (4, 6)
    """An evaluation is due when so many of so many latest requests are unlike all that is known."""
    every: int = 24
    """Requests between two evaluations while examples are few."""
    latest: int = 16
    """Requests that show which kinds come now."""
    least_of_kind: int = 5
    """A kind comes when it has so many of the latest requests."""
    enough: int = 48
    """Examples of a kind."""
    _stage: int = field(default=0, init=False)
    _last: int = field(default=0, init=False)

    def due(self, known: Learnt) -> int:
        """See `Learning`."""
        count = self._due(known)
        if count:
            self._last = known.served
        return count

    def _due(self, known: Learnt) -> int:
        if self._stage < len(self.first):
            if known.served < self.first[self._stage]:
                return 0
            before = self.first[self._stage - 1] if self._stage else 0
            self._stage += 1
            return self.first[self._stage - 1] - before
        since = known.served - self._last
        most, among = self.unlike
        if since >= among and sum(known.unlike[-among:]) >= most:
            return self.group
        kinds = known.kinds[-self.latest :]
        few = [
            kind
            for kind, examples in enumerate(known.examples)
            if examples < self.enough and kinds.count(kind) >= self.least_of_kind
        ]
        return self.group if since >= self.every and few else 0
