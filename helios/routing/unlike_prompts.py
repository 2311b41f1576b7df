"""What a worker remembers of prompts that are unlike all that was learnt from."""

from collections import deque
from collections.abc import Mapping
from statistics import fmean

# An unlike prompt is rarely alone. After so many among so many of the last prompts, others are suspected too.
_SUSPECTED, _OF_LAST = 2, 6
# The newest ones count, because such traffic may change too.
_KEPT = 16


class UnlikePrompts:
    """The last unlike prompts. What their readings have in common tells which model is the safe one."""

    def __init__(self) -> None:
        self._are_unlike: deque[bool] = deque(maxlen=_OF_LAST)
        self._readings: deque[Mapping[str, float]] = deque(maxlen=_KEPT)

    def add(self, readings: Mapping[str, float] | None) -> None:
        """Adds a routed prompt. readings: nats by model; None: it was not unlike."""
        self._are_unlike.append(readings is not None)
        if readings is not None:
            self._readings.append(readings)

    @property
    def are_likely(self) -> bool:
        """Whether the next prompt may well be unlike all examples too."""
        return sum(self._are_unlike) >= _SUSPECTED

    def mean(self, readings: Mapping[str, float]) -> tuple[dict[str, float], int]:
        """Mean nats by model of this prompt and of those that the same models have read, and their number."""
        same = [readings, *(one for one in self._readings if one.keys() == readings.keys())]
        return {model: fmean(one[model] for one in same) for model in readings}, len(same)
