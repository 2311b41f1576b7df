"""How much worse each model reads each token: a table by token id, learnt from examples."""

from collections.abc import Sequence
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

# A token's mean is shrunk towards that of all tokens, as if it had been seen so many times more.
_PRIOR_TOKENS = 3.0


class TokenTableRecord(BaseModel):
    """A table as JSON. Each of the first two has one entry for each known token."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    ids: tuple[int, ...]
    counts: tuple[int, ...]
    sums: tuple[tuple[float, ...], ...]
    """For each token, the sum of the nats of each model but the first, minus those of the first model."""


class TokenTable:
    """Scores a text by its tokens alone, for every model but the first, relative to the first one.

    It costs nothing while serving, and tells domains apart like naive Bayes.
    """

    def __init__(self, counts: NDArray[np.float64], sums: NDArray[np.float64]) -> None:
        """counts: [vocabulary]; sums: [vocabulary, models - 1]. See `TokenTableRecord`."""
        self._counts, self._sums = counts, sums
        self._mean = sums.sum(axis=0) / max(counts.sum(), 1.0)

    @classmethod
    def of(cls, texts: Sequence[NDArray[np.int64]], excess: Sequence[NDArray[np.float64]]) -> Self:
        """texts: ids [tokens] of each text; excess: [tokens, models - 1], as the sums of a record."""
        size = 1 + max((int(ids.max()) for ids in texts if len(ids)), default=0)
        counts, sums = np.zeros(size), np.zeros((size, excess[0].shape[1] if excess else 0))
        for ids, more in zip(texts, excess, strict=True):
            np.add.at(counts, ids, 1.0)
            np.add.at(sums, ids, more)
        return cls(counts, sums)

    @classmethod
    def from_record(cls, record: TokenTableRecord, models: int) -> Self:
        """models: their number. Raises ValueError when the record is not consistent."""
        ids = np.array(record.ids, dtype=np.int64)
        if len(ids) and ids.min() < 0:
            raise ValueError("token ids must not be negative")
        size = 1 + int(ids.max(initial=0))
        counts, sums = np.zeros(size), np.zeros((size, models - 1))
        counts[ids] = record.counts
        sums[ids] = np.array(record.sums, dtype=np.float64).reshape(len(ids), models - 1)
        return cls(counts, sums)

    def record(self) -> TokenTableRecord:
        """The table as JSON."""
        ids = np.nonzero(self._counts)[0]
        return TokenTableRecord(
            ids=tuple(ids.tolist()),
            counts=tuple(int(count) for count in self._counts[ids]),
            sums=tuple(tuple(round(one, 3) for one in row) for row in self._sums[ids].tolist()),
        )

    def without(self, ids: NDArray[np.int64], excess: NDArray[np.float64]) -> "TokenTable":
        """The table as if it had not been learnt from this text."""
        counts, sums = self._counts.copy(), self._sums.copy()
        np.add.at(counts, ids, -1.0)
        np.add.at(sums, ids, -excess)
        return TokenTable(counts, sums)

    def scores(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float64], float]:
        """Mean excess of the text's tokens for every model but the first, and the share of known tokens."""
        if not len(ids):
            return self._mean, 0.0
        means, is_known = self._of_tokens
        # The last row is that of tokens which the table does not have.
        rows = np.minimum(ids, len(is_known) - 1)
        return means[rows].sum(axis=0) / len(ids), float(is_known[rows].sum()) / len(ids)

    @cached_property
    def _of_tokens(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """For each token, and for any other one: its shrunk mean excess, and whether it is known."""
        counts, sums = np.append(self._counts, 0.0), np.vstack([self._sums, np.zeros_like(self._mean)])
        return (sums + _PRIOR_TOKENS * self._mean) / (counts + _PRIOR_TOKENS)[:, None], counts > 0
