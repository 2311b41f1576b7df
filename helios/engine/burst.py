"""What a compiled call does beside a step: how often, whose tokens it draws, and when it is to stop early."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helios.engine.sequence import Sequence


class Draws(NamedTuple):
    """How the tokens of read rows are drawn, as `drawing.draw` takes it; no rows: none are."""

    # Seed, position and top-k: uint64 [reads, 3].
    numbers: NDArray[np.uint64]
    # Temperature, 0 where the likeliest is taken, and top-p: float64 [reads, 2].
    chances: NDArray[np.float64]

    @classmethod
    def of(cls, readers: Seq[Sequence]) -> "Draws":
        """Of the sequences that get a token."""
        if not any(seq.is_drawn for seq in readers):
            return NO_DRAWS
        numbers, chances = [], []
        for seq in readers:
            sampling = seq.sampling
            numbers.append((sampling.seed, len(seq.token_ids), sampling.top_k))
            chances.append((sampling.temperature if seq.is_drawn else 0.0, sampling.top_p))
        return cls(np.array(numbers, dtype=np.uint64), np.array(chances))


NO_DRAWS = Draws(np.empty((0, 3), dtype=np.uint64), np.empty((0, 2)))


class Interrupt:
    """Ends a burst at the edge between two of its steps. Any thread may ask for it."""

    def __init__(self) -> None:
        # Whether it was asked for, and how many steps a burst that was ended had taken.
        self._words: NDArray[Any] = np.zeros(2, dtype=np.int64)
        self.address: int = self._words.ctypes.data

    def ask(self) -> None:
        """Ends the burst that runs or, if none does, the next one after its first step."""
        self._words[0] = 1

    def clear(self) -> None:
        """Forgets what was asked."""
        self._words[:] = 0

    def steps_of(self, count: int) -> int:
        """How many steps a burst of `count` has taken."""
        return int(self._words[1]) or count


@dataclass(frozen=True, slots=True)
class Burst:
    """`count` steps: one, or several of decodes alone, each of the tokens of the one before."""

    count: int = 1
    draws: Draws = NO_DRAWS
    interrupt: Interrupt | None = None


ONE_STEP = Burst()
