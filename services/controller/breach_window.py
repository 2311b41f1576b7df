"""The window of the confidence breach counter (CBC): unsure tokens among the last generated ones."""

from collections import deque


class BreachWindow:
    """The shortest run of telemetry samples that covers at least `size` tokens.

    A worker counts tokens but does not list them, so the window is only as precise as its telemetry.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # (generated tokens, unsure tokens) counters, oldest first.
        self._samples: deque[tuple[int, int]] = deque()

    def add(self, generated: int, high_exit: int) -> None:
        """Adds a worker's counters. Counters that have decreased come from a new process."""
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
        # Copied in one step, because metrics are read on another thread.
        samples = tuple(self._samples)
        return samples[-1][1] - samples[0][1] if samples else 0
