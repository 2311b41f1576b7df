"""Limits how many prompt tokens a step may compute beside decoding sequences."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from helios.engine.scheduling.sequence import Sequence
from helios.served import ServedPlan

# Weights of a new observation in the running means. Steps slower than the mean count less, because other work
# on the machine only ever makes steps slower.
_WEIGHT, _SLOWER_WEIGHT = 0.2, 0.02
# The same for prefills. Chunks vary in size, so more of them are needed.
_PREFILL_WEIGHT, _SLOWER_PREFILL_WEIGHT = 0.1, 0.02
# Chunks must differ by this share of their mean size before they tell a fixed time from that of a token.
_LEAST_SPREAD = 0.2


@dataclass(frozen=True, slots=True)
class _Prefill:
    """What prefill adds to a step: a fixed time, and a time for each token. A line through recent steps.

    tokens, seconds, squares, products: running means of a step's prompt tokens, of the seconds that they
    added, of the square of the tokens, and of tokens x seconds.
    """

    tokens: float
    seconds: float
    squares: float
    products: float

    @classmethod
    def of(cls, tokens: float, seconds: float) -> "_Prefill":
        return cls(tokens, seconds, tokens * tokens, tokens * seconds)

    @property
    def per_token(self) -> float:
        """Seconds of a further token. While all chunks are alike, the fixed time counts as theirs."""
        most = self.seconds / self.tokens
        spread = self.squares - self.tokens**2
        if spread < (_LEAST_SPREAD * self.tokens) ** 2:
            return most
        return min(max((self.products - self.tokens * self.seconds) / spread, 0.0), most)

    def seconds_of(self, tokens: float) -> float:
        return self.seconds + self.per_token * (tokens - self.tokens)

    def observe(self, tokens: float, seconds: float) -> "_Prefill":
        slower = seconds > self.seconds_of(tokens)
        weight, new = _SLOWER_PREFILL_WEIGHT if slower else _PREFILL_WEIGHT, _Prefill.of(tokens, seconds)
        return _Prefill(
            _mean(self.tokens, new.tokens, weight),
            _mean(self.seconds, new.seconds, weight),
            _mean(self.squares, new.squares, weight),
            _mean(self.products, new.products, weight),
        )

    def scaled(self, factor: float) -> "_Prefill":
        return replace(self, seconds=factor * self.seconds, products=factor * self.products)


class ChunkBudget:
    """Sizes prefill chunks so that a step with them takes at most `stretch` times as long as one without.

    Running chunks beside decodes is from Sarathi-Serve (Agrawal et al. 2024, section 4.2), which fixes their
    size. Here the size follows from the measured step times of this machine and the plans in force.

    Only the time of the tokens counts. What any prefill takes besides is not saved by a smaller chunk. If it
    counted as the tokens' time, tokens would seem slow in small chunks, so chunks would stay small.

    Steps of several plans are compared by the cost of their sequences: the time of a step is taken to grow
    with their mean cost.
    """

    def __init__(
        self,
        stretch: float,
        least: int,
        most: int,
        costs: Mapping[ServedPlan, float] = MappingProxyType({}),
    ) -> None:
        """stretch: above 1; infinite: no limit. least, most: bounds on the tokens, whatever is observed.

        costs: what a decoding sequence of each plan costs, relative to one of the first plan. Without it, all
        cost the same.
        """
        self._stretch, self._costs = stretch, costs
        self._least = min(least, most)
        self._most = most
        # Seconds of a step of cost 1 without prefill, by the bit length of its number of sequences.
        self._decode: dict[int, float] = {}
        # Expected seconds of such steps, until they have been observed.
        self._expected: dict[int, float] = {}
        # None: no prefill has been observed.
        self._prefill: _Prefill | None = None

    def expect(self, other: "ChunkBudget", factor: float) -> None:
        """Expects steps to take `factor` times as long as in the other budget, until `settle`."""
        self._expected = {key: factor * seconds for key, seconds in other._decode.items()}
        self._prefill = None if other._prefill is None else other._prefill.scaled(factor)

    def settle(self) -> None:
        """Drops the expected times of decode steps. From now on only observations count."""
        self._expected = {}

    def cost(self, decoding: Collection[Sequence]) -> float:
        """Mean cost of these sequences. 1 if there are none."""
        if not self._costs or not decoding:
            return 1.0
        return sum(self._costs.get(seq.plan, 1.0) for seq in decoding) / len(decoding)

    def tokens(self, decoding: int, waiting: int = 1, cost: float = 1.0) -> int:
        """Most prompt tokens of a step in which `decoding` sequences decode and `waiting` wait for prefill.

        If more wait than decode, the step may take proportionally longer, for the sake of the waiting ones.
        Returns 0 while the time of such a decode step is unknown: a step without prompts must measure it
        first. cost: mean cost of the sequences that decode.
        """
        if not decoding or math.isinf(self._stretch):
            return self._most
        step = self.decode_seconds(decoding, cost)
        if step is None:
            return 0
        if self._prefill is None:
            return self._least
        room = (self._stretch - 1) * step * max(1.0, waiting / decoding)
        fitting = room / max(self._prefill.per_token, 1e-9)
        return int(min(max(fitting, self._least), self._most))

    def decode_seconds(self, decoding: int, cost: float = 1.0) -> float | None:
        """Seconds of a step in which only `decoding` sequences decode, of this mean cost. None: unknown."""
        key = decoding.bit_length()
        seconds = self._decode.get(key, self._expected.get(key))
        return None if seconds is None else cost * seconds

    def observe(self, decoding: int, prompt_tokens: int, seconds: float, cost: float = 1.0) -> None:
        """Notes how long a step took. cost: mean cost of the sequences that decoded."""
        if not prompt_tokens:
            key, seconds = decoding.bit_length(), seconds / cost
            before = self._decode.get(key, seconds)
            self._decode[key] = _mean(before, seconds, _SLOWER_WEIGHT if seconds > before else _WEIGHT)
            return
        step = self.decode_seconds(decoding, cost) if decoding else 0.0
        # Small chunks tell little, because most of their step's time is fixed cost.
        if step is not None and prompt_tokens >= self._least:
            added = max(seconds - step, 0.0)
            before_it = self._prefill
            self._prefill = (
                _Prefill.of(prompt_tokens, added)
                if before_it is None
                else before_it.observe(prompt_tokens, added)
            )


def _mean(before: float, new: float, weight: float) -> float:
    return before + weight * (new - before)
