"""The window of the confidence breach counter (CBC): unsure tokens among the last generated ones."""

from collections import deque


class BreachWindow:
    """The shortest stretch of telemetry samples that holds at least `size` tokens.

    A worker counts tokens and does not list them, so the window is only as fine as its telemetry.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # Counters of generated and of unsure tokens, oldest first.
        self._samples: deque[tuple[int, int]] = deque()

    def add(self, generated: int, high_exit: int) -> None:
        """Takes in a worker's counters. Counters that went back are those of a new process."""
        if self._samples and generated < self._samples[-1][0]:
            self._samples.clear()
        self._samples.append((generated, high_exit))
        while len(self._samples) > 2 and generated - self._samples[1][0] >= self._size:
            self._samples.popleft()

    def clear(self) -> None:
        """Begins a new window at the last sample."""
        while len(self._samples) > 1:
            self._samples.popleft()

    @property
    def tokens(self) -> int:
        """Tokens in the window."""
        return self._samples[-1][0] - self._samples[0][0] if self._samples else 0

    @property
    def high_exit_tokens(self) -> int:
        """Unsure tokens in the window."""
        # Copied in one step: metrics are read on a thread of their own.
        samples = tuple(self._samples)
        return samples[-1][1] - samples[0][1] if samples else 0
