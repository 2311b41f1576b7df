"""Whether the traffic under a plan is still what the plan was chosen for.

The tests use figures that serving gives anyway, so they cost nothing.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from helios.history import ModelProfile
from helios.served import ServedPlan
from services.controller.cusum import Cusum, Moment, Tuning
from services.controller.situation import Reading

# A profile's expectation counts as at most this many requests until served requests refine it. Generated text
# is not like the profiled prompts, so what is expected of its confidences is less certain.
_PROMPT_WEIGHT, _CONFIDENCE_WEIGHT = 25.0, 5.0
# The weight of confidences after a false alarm: generated text is then surer than the profile expects.
_DOUBTED_WEIGHT = 1.0
# Generated tokens whose mean confidence counts as one observation.
_BLOCK_TOKENS = 32
# Smallest standard deviation of a token's confidence in nats: a histogram's bins hide smaller ones.
_LEAST_DEVIATION = 0.1
# How much more the mean of a block varies than if its tokens were independent (Kish's design effect).
_CLUSTERING = 2.0
# After this many more prompts, a prompt counts a third (1/e) of what the newest counts.
_READING_PROMPTS = 100.0


@dataclass(frozen=True, slots=True)
class Served:
    """What was served under one plan over some time. All fields are counts, except nats."""

    plan: ServedPlan
    requests: int = 0
    tokens: int = 0
    """Generated tokens whose confidences are known."""
    confidence_nats: float = 0.0
    """Sum of the negative natural logarithms of their confidences."""
    prompts_read: int = 0
    """Prompts of which some tokens were read out. The next fields have these tokens and their nats."""
    prompt_tokens_read: int = 0
    prompt_nats: float = 0.0

    def plus(self, other: "Served") -> "Served":
        """Both together."""
        return Served(
            self.plan,
            self.requests + other.requests,
            self.tokens + other.tokens,
            self.confidence_nats + other.confidence_nats,
            self.prompts_read + other.prompts_read,
            self.prompt_tokens_read + other.prompt_tokens_read,
            self.prompt_nats + other.prompt_nats,
        )


class Side(enum.Enum):
    """Which way the traffic has changed for a plan. WORSE: the plan reads it worse and is less sure."""

    WORSE = "worse"
    BETTER = "better"


class TrafficWatch:
    """Two figures of the traffic under a plan, tested against what its profile expects.

    The nats of prompts' own tokens say how well the plan reads the traffic. The confidences of generated
    tokens say how sure it is.
    """

    def __init__(self, plan: ServedPlan, profile: ModelProfile, now: float, *, trusted: bool) -> None:
        """profile: has the plan's depth. now: seconds. trusted: whether its expected confidences hold."""
        self.plan = plan
        # Up to when served requests were taken in.
        self._last = Moment(0, now)
        one = profile.at(plan.depth)
        index = profile.exits.index(one)
        self._prompts_mean = mean = math.log(one.perplexity)
        per_token = [
            sample.nats[index] / sample.text_bytes * profile.bytes_per_token
            for sample in profile.samples
            if sample.text_bytes
        ]
        # Variance between requests; a guess when there are too few to tell.
        known = len(per_token) > 1
        self._between = (
            sum((value - mean) ** 2 for value in per_token) / len(per_token) if known else mean**2 / 4
        )
        self._prompt_weight = min(max(len(per_token), 2), _PROMPT_WEIGHT)
        # Made when the first prompt is read, which tells how many tokens of a prompt are read.
        self._prompts: Cusum | None = None
        self._prompts_deviation = 0.0
        mean, deviation = one.confidence_nats
        self._confidences = Cusum(
            mean,
            max(deviation, _LEAST_DEVIATION) * math.sqrt(_CLUSTERING / _BLOCK_TOKENS),
            _CONFIDENCE_WEIGHT if trusted else _DOUBTED_WEIGHT,
        )
        self._reading_mean = self._reading_weight = self._reading_squares = 0.0

    def add(self, served: Served, tuned: Sequence[Tuning], now: float) -> None:
        """Takes in what was served. `now` is in seconds."""
        # A prompt that was read can be evaluated, although its request is not finished.
        self._last = Moment(self._last.requests + max(served.requests, served.prompts_read), now)
        if served.prompts_read and served.prompt_tokens_read:
            tokens = served.prompt_tokens_read / served.prompts_read
            mean = served.prompt_nats / served.prompt_tokens_read
            if self._prompts is None:
                # The standard deviation of single tokens' nats is about their mean.
                self._prompts_deviation = math.sqrt(self._between + self._prompts_mean**2 / tokens)
                self._prompts = Cusum(self._prompts_mean, self._prompts_deviation, self._prompt_weight)
            self._read(mean, served.prompts_read)
            self._prompts.add(mean, served.prompts_read, tuned, self._last)
        if served.tokens:
            mean, blocks = served.confidence_nats / served.tokens, served.tokens / _BLOCK_TOKENS
            self._confidences.add(mean, blocks, tuned, self._last)

    def alarm(self) -> tuple[Side, Moment] | None:
        """Which way the traffic has changed, the requests since then, and when that was; None: it has not."""
        tests = [test for test in (self._confidences, self._prompts) if test is not None]
        for side in Side:
            found = [test for test in tests if (test.rise if side is Side.WORSE else test.fall) >= 1]
            if found:
                began = min(test.began for test in found)
                return side, Moment(self._last.requests - began.requests, began.seconds)
        return None

    @property
    def reading(self) -> Reading | None:
        """What recent prompts gave under the plan; None: none was read."""
        if not self._reading_weight:
            return None
        error = self._prompts_deviation * math.sqrt(self._reading_squares) / self._reading_weight
        return Reading(
            model=self.plan.model, depth=self.plan.depth, nats_per_token=self._reading_mean, error=error
        )

    def _read(self, mean: float, prompts: int) -> None:
        """Takes the mean of some prompts into the reading, in which older prompts fade."""
        fade = math.exp(-prompts / _READING_PROMPTS)
        self._reading_weight = self._reading_weight * fade + prompts
        self._reading_squares = self._reading_squares * fade**2 + prompts
        self._reading_mean += (mean - self._reading_mean) * prompts / self._reading_weight
