"""The part of a compiled call beyond the step: number of steps, choice of tokens, early stop."""

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from helios.engine.backends.sampler import Row
from helios.engine.kernels.layout import DRAW, Draws
from helios.engine.scheduling.sequence import Sequence
from helios.sampling import SamplingParams

NO_DRAWS = Draws(np.empty(0, dtype=DRAW), np.empty(0, dtype=np.int64))


def draws_for(readers: Seq[Sequence], others: int = 0) -> Draws:
    """Draws for the sequences that get a token. others: rows after theirs whose token is not used."""
    if all(seq.takes_likeliest for seq in readers):
        return NO_DRAWS
    return draws_of([*(Row.of(seq) for seq in readers), *[Row(SamplingParams(), 0, ())] * others])


def draws_of(rows: Seq[Row]) -> Draws:
    """Draws for all rows that are read."""
    draws, history = [], list[int]()
    for sampling, position, token_ids in rows:
        if sampling.repetition_penalty != 1:
            history += token_ids
        draws.append(
            (
                sampling.seed,
                position,
                sampling.top_k,
                sampling.temperature,
                sampling.top_p,
                sampling.repetition_penalty,
                len(history),
            )
        )
    return Draws(np.array(draws, dtype=DRAW), np.array(history, dtype=np.int64))


class Interrupt:
    """Ends a burst between two of its steps. Any thread may ask for it."""

    def __init__(self) -> None:
        # [0]: whether someone asked to stop. [1]: steps that the stopped burst had taken.
        self._words: NDArray[Any] = np.zeros(2, dtype=np.int64)
        self.address: int = self._words.ctypes.data

    def ask(self) -> None:
        """Ends the running burst. If none runs, the next one ends after its first step."""
        self._words[0] = 1

    def clear(self) -> None:
        """Clears an earlier request to stop."""
        self._words[:] = 0

    def steps_of(self, count: int) -> int:
        """How many steps a burst of `count` steps has taken."""
        return int(self._words[1]) or count


NO_LAST_TOKENS: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)


class Burst(NamedTuple):
    """One step, or several that only decode. Each step computes the tokens that the one before it chose."""

    steps: int = 1
    draws: Draws = NO_DRAWS
    interrupt: Interrupt | None = None
    # Tokens that end a row's text and so the burst: int64 [reads, any]. -1 is padding. May have no rows.
    last_tokens: NDArray[np.int64] = NO_LAST_TOKENS

    @classmethod
    def of(
        cls,
        steps: int,
        readers: Seq[Sequence],
        eos_token_ids: tuple[int, ...],
        interrupt: Interrupt,
        others: int = 0,
    ) -> Self:
        """A burst for the sequences that get a token. others: number of rows that are read after theirs."""
        last_tokens = NO_LAST_TOKENS
        if steps > 1 and not all(seq.sampling.ignore_eos for seq in readers):
            none = (-1,) * len(eos_token_ids)
            rows = [none if seq.sampling.ignore_eos else eos_token_ids for seq in readers]
            last_tokens = np.array(rows, dtype=np.int64)
        return cls(steps, draws_for(readers, others), interrupt, last_tokens)


ONE_STEP = Burst()
