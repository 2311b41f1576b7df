"""How many prompt tokens a step may compute beside sequences that decode."""

import math

# Weights of a new observation in the running means. A decode step that took longer than the mean counts less:
# other work on the machine makes steps slower, never faster.
_WEIGHT, _SLOWER_WEIGHT = 0.2, 0.02


class ChunkBudget:
    """Sizes the chunks of prefills so that a step with them takes at most `stretch` times one without.

    Chunks beside decodes are Sarathi-Serve's (Agrawal et al. 2024, section 4.2), where their size is fixed.
    Here the size follows from how long steps have taken on this machine, with this model at this depth.
    """

    def __init__(self, stretch: float, least: int, most: int) -> None:
        """stretch: above 1; infinite: no bound. least, most: bounds on the tokens, whatever is observed."""
        self._stretch = stretch
        self._least = min(least, most)
        self._most = most
        # Seconds of a step without prefill, by the bit length of the number of its sequences.
        self._decode: dict[int, float] = {}
        # What such steps are expected to take until they have been observed.
        self._expected: dict[int, float] = {}
        self._per_token: float | None = None

    def expect(self, other: "ChunkBudget", factor: float) -> None:
        """Expects steps to take `factor` times as long as the other budget has observed, until `settle`."""
        self._expected = {key: factor * seconds for key, seconds in other._decode.items()}
        self._per_token = None if other._per_token is None else factor * other._per_token

    def settle(self) -> None:
        """Drops the expectations about decode steps: from now on only observations count."""
        self._expected = {}

    def tokens(self, decoding: int, waiting: int = 1) -> int:
        """Most prompt tokens of a step in which `decoding` sequences decode and `waiting` wait for prefill.

        When more wait than decode, the step may take longer in proportion, for the sake of those who wait.
        0 while the time of a step of so many decodes is unknown: a step without prompts has to show it first.
        """
        if not decoding or math.isinf(self._stretch):
            return self._most
        step = self.decode_seconds(decoding)
        if step is None:
            return 0
        if self._per_token is None:
            return self._least
        room = (self._stretch - 1) * step * max(1.0, waiting / decoding)
        fitting = room / max(self._per_token, 1e-9)
        return int(min(max(fitting, self._least), self._most))

    def decode_seconds(self, decoding: int) -> float | None:
        """Seconds of a step in which so many sequences decode and nothing else runs; None while unknown."""
        key = decoding.bit_length()
        return self._decode.get(key, self._expected.get(key))

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Notes how long a step took."""
        if not prompt_tokens:
            key = decoding.bit_length()
            before = self._decode.get(key, seconds)
            self._decode[key] = _mean(before, seconds, _SLOWER_WEIGHT if seconds > before else _WEIGHT)
            return
        step = self.decode_seconds(decoding) if decoding else 0.0
        # Chunks of a few tokens show little: most of their step's time is what any step takes.
        if step is not None and prompt_tokens >= self._least:
            added = max(seconds - step, 0.0) / prompt_tokens
            self._per_token = added if self._per_token is None else _mean(self._per_token, added, _WEIGHT)


def _mean(before: float, new: float, weight: float) -> float:
    return before + weight * (new - before)
