"""How much worse an option predicts recent traffic than a whole model, and how certain that is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from helios.history import MAX_EXPONENT, ExitProfile, ModelProfile
from services.controller.situation import Reading, Situation

# Fewest requests for which a standard error is computed.
_FEWEST_PAIRS = 2
# Within this many standard errors, the evaluated requests differ from all traffic only by chance.
_LIKELY_SIGMAS = 3.0
# Factor on the variance when there are only two or three requests.
_FEW_FACTOR = 5.0
# Fewest requests for which a difference is corrected by what is known about all traffic.
_FEWEST_CONTROLLED = 10


class Increase(NamedTuple):
    """Rise of an option's perplexity over one candidate at full depth."""

    share: float
    error: float | None
    """Standard error of the share. None: measured on too few requests."""
    is_own: bool
    """Whether that candidate is the option's own model."""


def increases_of(
    profile: ModelProfile, one: ExitProfile, references: Sequence[ModelProfile], control: "Control | None"
) -> tuple[Increase, ...]:
    """The rise over each candidate (`references`) at full depth."""
    # Tokenizers differ, so all rises are per token of the best candidate.
    best = min(references, key=lambda profile: (profile.full.nats_per_byte, profile.model))
    found = []
    for reference in references:
        nats, error = _excess(profile, one, reference, control)
        # Any bound refuses an option that reaches the largest exponent.
        increase = math.expm1(min(nats * best.bytes_per_token, MAX_EXPONENT))
        share = None if error is None else (1 + increase) * error * best.bytes_per_token
        found.append(Increase(increase, share, is_own=reference is profile))
    return tuple(found)


class Control:
    """A control variate: the nats of all recent prompts under the served plan.

    By chance, the few evaluated requests may be easier or harder than the traffic. The served plan has read
    both, so it shows by how much. Regression on this corrects the difference of two options (Cochran,
    Sampling Techniques, 7).
    """

    def __init__(self, reading: Reading, profile: ModelProfile) -> None:
        index = profile.exits.index(profile.at(reading.depth))
        # Nats under the served plan, by request.
        self.nats = {sample.id: sample.nats[index] for sample in profile.samples}
        # Both are per byte, like the options.
        self.mean = reading.nats_per_token / profile.bytes_per_token
        self.variance = (reading.error / profile.bytes_per_token) ** 2

    @classmethod
    def of(cls, situation: Situation) -> "Control | None":
        """Builds it from a situation. None when no prompt was read or the served plan was not profiled."""
        reading = situation.reading
        profile = None if reading is None else situation.history.get(reading.model)
        if reading is None or profile is None or profile.find_exit(reading.depth) is None:
            return None
        return cls(reading, profile)


def _excess(
    profile: ModelProfile, one: ExitProfile, reference: ModelProfile, control: Control | None
) -> tuple[float, float | None]:
    """Nats per byte in excess of the reference at full depth, and their standard error.

    Both are computed on the requests on which both models were evaluated, so that the difficulty of a request
    cancels out. With fewer than two such requests the result is the difference of the means, with an unknown
    error.
    """
    index = profile.exits.index(one)
    others = {sample.id: sample for sample in reference.samples}
    pairs = [(sample, others[sample.id]) for sample in profile.samples if sample.id in others]
    # Both samples of a pair have the same text.
    sizes = [own.text_bytes for own, _ in pairs]
    if len(pairs) < _FEWEST_PAIRS or not sum(sizes):
        return one.nats_per_byte - reference.full.nats_per_byte, None
    excess, residuals = _rate([own.nats[index] - other.nats[-1] for own, other in pairs], sizes)
    count = len(pairs)
    variance = math.fsum(r * r for r in residuals) / (count * (count - 1))
    if (
        control is not None
        and count >= _FEWEST_CONTROLLED
        and all(own.id in control.nats for own, _ in pairs)
    ):
        mean, deviations = _rate([control.nats[own.id] for own, _ in pairs], sizes)
        spread = math.fsum(d * d for d in deviations)
        own_variance = spread / (count * (count - 1))
        # A larger difference means other traffic, or another part of its prompts. Then nothing is corrected.
        likely = _LIKELY_SIGMAS * math.sqrt(own_variance + control.variance)
        if spread and abs(control.mean - mean) <= likely:
            slope = math.fsum(r * d for r, d in zip(residuals, deviations, strict=True)) / spread
            # Each of the two means is weighted by its certainty.
            slope *= own_variance / (own_variance + control.variance)
            excess += slope * (control.mean - mean)
            left = math.fsum((r - slope * d) ** 2 for r, d in zip(residuals, deviations, strict=True))
            variance = left / (count * (count - 2)) + slope**2 * control.variance
    # A standard error from few requests is itself uncertain. Student's t has this much more variance.
    freedom = count - 1
    return excess, math.sqrt(variance * (freedom / (freedom - 2) if freedom > 2 else _FEW_FACTOR))


def _rate(nats: Sequence[float], sizes: Sequence[int]) -> tuple[float, list[float]]:
    """Nats per byte of the requests, and each request's residual by linearisation (Cochran, 6)."""
    rate, mean_size = math.fsum(nats) / sum(sizes), sum(sizes) / len(sizes)
    return rate, [(one - rate * size) / mean_size for one, size in zip(nats, sizes, strict=True)]
