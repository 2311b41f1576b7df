"""Tests whether the traffic under a plan is still like the traffic for which the plan was chosen.

The tests use figures that serving produces anyway, so they cost nothing.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from helios.history import ModelProfile
from helios.served import ServedPlan
from services.controller.cusum import Cusum, Moment, Tuning
from services.controller.situation import Reading

# A profile's expectation weighs as much as at most this many requests, until served requests refine it.
# Generated text differs from the profiled prompts, so expected confidences are less certain.
_PROMPT_WEIGHT, _CONFIDENCE_WEIGHT = 25.0, 5.0
# The weight of expected confidences after a false alarm: generated text is then surer than the profile
# expects.
_DOUBTED_WEIGHT = 1.0
# Number of generated tokens whose mean confidence counts as one observation.
_BLOCK_TOKENS = 32
# Smallest standard deviation of a token's confidence in nats, because a histogram's bins hide smaller ones.
_LEAST_DEVIATION = 0.1
# Factor by which a block's mean varies more than if its tokens were independent (Kish's design effect).
_CLUSTERING = 2.0
# After this many further prompts, a prompt's weight is a third (1/e) of the newest prompt's.
_READING_PROMPTS = 100.0


@dataclass(frozen=True, slots=True)
class Served:
    """What was served under one plan during some time. All fields are counts, except nats."""

    plan: ServedPlan
    requests: int = 0
    tokens: int = 0
    """Generated tokens with known confidence."""
    confidence_nats: float = 0.0
    """Sum of the negative natural logarithms of their confidences."""
    prompts_read: int = 0
    """Prompts of which some tokens were read out. The next fields count these tokens and sum their nats."""
    prompt_tokens_read: int = 0
    prompt_nats: float = 0.0

    def plus(self, other: "Served") -> "Served":
        """The sum of both."""
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
    """Direction of a traffic change for a plan. WORSE: the plan predicts it worse and is less sure."""

    WORSE = "worse"
    BETTER = "better"


class TrafficWatch:
    """Two figures of the traffic under a plan, tested against the expectations of its profile.

    The nats of prompts' own tokens show how well the plan predicts the traffic. The confidences of generated
    tokens show how sure it is.
    """

    def __init__(self, plan: ServedPlan, profile: ModelProfile, now: float, *, trusted: bool) -> None:
        """profile: has the plan's depth. now: seconds. trusted: whether its expected confidences hold."""
        self.plan = plan
        # When served requests were last added.
        self._last = Moment(0, now)
        one = profile.at(plan.depth)
        index = profile.exits.index(one)
        self._prompts_mean = mean = math.log(one.perplexity)
        per_token = [
            sample.nats[index] / sample.text_bytes * profile.bytes_per_token
            for sample in profile.samples
            if sample.text_bytes
        ]
        # Variance between requests. It is a guess when there are too few to tell.
        known = len(per_token) > 1
        self._between = (
            sum((value - mean) ** 2 for value in per_token) / len(per_token) if known else mean**2 / 4
        )
        self._prompt_weight = min(max(len(per_token), 2), _PROMPT_WEIGHT)
        # Created when the first prompt is read, which shows how many tokens of a prompt are read.
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
        """Adds what was served. `now` is in seconds."""
        # A prompt that was read can be evaluated before its request is finished.
        self._last = Moment(self._last.requests + max(served.requests, served.prompts_read), now)
        if served.prompts_read and served.prompt_tokens_read:
            tokens = served.prompt_tokens_read / served.prompts_read
            mean = served.prompt_nats / served.prompt_tokens_read
            if self._prompts is None:
                # The standard deviation of single tokens' nats is about as large as their mean.
                self._prompts_deviation = math.sqrt(self._between + self._prompts_mean**2 / tokens)
                self._prompts = Cusum(self._prompts_mean, self._prompts_deviation, self._prompt_weight)
            self._read(mean, served.prompts_read)
            self._prompts.add(mean, served.prompts_read, tuned, self._last)
        if served.tokens:
            mean, blocks = served.confidence_nats / served.tokens, served.tokens / _BLOCK_TOKENS
            self._confidences.add(mean, blocks, tuned, self._last)

    def alarm(self) -> tuple[Side, Moment] | None:
        """Direction of a traffic change, the requests since then, and when it began. None: no change."""
        tests = [test for test in (self._confidences, self._prompts) if test is not None]
        for side in Side:
            found = [test for test in tests if (test.rise if side is Side.WORSE else test.fall) >= 1]
            if found:
                began = min(test.began for test in found)
                return side, Moment(self._last.requests - began.requests, began.seconds)
        return None

    @property
    def reading(self) -> Reading | None:
        """Nats of recent prompts under the plan. None: none was read."""
        if not self._reading_weight:
            return None
        error = self._prompts_deviation * math.sqrt(self._reading_squares) / self._reading_weight
        return Reading(
            model=self.plan.model, depth=self.plan.depth, nats_per_token=self._reading_mean, error=error
        )

    def _read(self, mean: float, prompts: int) -> None:
        """Adds the mean of some prompts to the reading, in which older prompts fade."""
        fade = math.exp(-prompts / _READING_PROMPTS)
        self._reading_weight = self._reading_weight * fade + prompts
        self._reading_squares = self._reading_squares * fade**2 + prompts
        self._reading_mean += (mean - self._reading_mean) * prompts / self._reading_weight
