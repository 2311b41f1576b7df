"""How many prompt tokens a step may take beside sequences that decode."""

import math

# Weight of a new observation in the running means; and of a decode step that took longer than before: what
# else the machine does makes steps slower, never faster.
_WEIGHT, _SLOWER_WEIGHT = 0.2, 0.02


class ChunkBudget:
    """Sizes the chunks of prefills so that a step with them takes at most `stretch` times one without.

    Chunks beside decodes are Sarathi-Serve's (Agrawal et al. 2024, section 4.2), where their size is fixed;
    here it follows from what steps have taken: on this machine, with this model at this depth.
    """

    def __init__(self, stretch: float, least: int, most: int) -> None:
        """stretch: above 1, infinite: no bound; least, most: bounds on the tokens, whatever is observed."""
        self._stretch = stretch
        self._least = min(least, most)
        self._most = most
        # Seconds of a step without prefill, by the power of two that its sequences reach.
        self._decode: dict[int, float] = {}
        # What they are expected to take while sequences move to this plan.
        self._expected: dict[int, float] = {}
        self._per_token: float | None = None

    def expect(self, other: "ChunkBudget", factor: float) -> None:
        """Expects `factor` times what steps take by another one, until `settle`."""
        self._expected = {key: factor * seconds for key, seconds in other._decode.items()}
        self._per_token = None if other._per_token is None else factor * other._per_token

    def settle(self) -> None:
        """Expects nothing any more of decode steps that were not observed."""
        self._expected = {}

    def tokens(self, decoding: int, waiting: int = 1) -> int:
        """Most prompt tokens of a step in which so many sequences decode and so many wait for their prefill.

        Where more wait than decode, it is for those who wait: a step may take longer in proportion. 0 where
        it is not known yet what a step of so many takes: one without prompts tells.
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
        """What a step of so many decodes alone takes; None while that is not known."""
        key = decoding.bit_length()
        return self._decode.get(key, self._expected.get(key))

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Takes in what a step took."""
        if not prompt_tokens:
            key = decoding.bit_length()
            before = self._decode.get(key, seconds)
            self._decode[key] = _mean(before, seconds, _SLOWER_WEIGHT if seconds > before else _WEIGHT)
            return
        step = self.decode_seconds(decoding) if decoding else 0.0
        # Chunks of a few tokens tell little: what one of them takes is mostly what any step takes.
        if step is not None and prompt_tokens >= self._least:
            added = max(seconds - step, 0.0) / prompt_tokens
            self._per_token = added if self._per_token is None else _mean(self._per_token, added, _WEIGHT)


def _mean(before: float, new: float, weight: float) -> float:
    return before + weight * (new - before)
