"""A plan that a router proposes for a request. It needs no NumPy, so gateways can use it."""

from dataclasses import dataclass

from helios.served import ServedPlan


@dataclass(frozen=True, slots=True)
class RankedPlan:
    """A plan that may serve a request.

    extra_seconds_per_token: more than the best plan, with the price of quality. expected_perplexity_increase:
    over the best model with all layers, a share. reason: why this plan, in words. is_unlike: whether the
    prompt is unlike all that was learnt from.
    """

    plan: ServedPlan
    extra_seconds_per_token: float
    expected_perplexity_increase: float
    reason: str
    is_unlike: bool = False
