"""Chooses between a single plan for all and a set from which a router chooses for each request."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from helios.served import ServedPlan
from services.controller.policy.settings import PolicySettings
from services.controller.situation import SetOffer, Situation, Trigger

# Sets of plans by worker, as in `SetOffer`.
Sets: TypeAlias = Mapping[str, tuple[ServedPlan, ...]]

# While so many of the newest prompts are unlike all examples, what is expected of any plan says little.
_NEW_TRAFFIC_SHARE = 0.25
_EXPLAINED = (Trigger.ROUTING, Trigger.SLO, Trigger.FAILURE)


class SetChoice(NamedTuple):
    """The sets to serve, and why in words. Both are empty where no router is wanted."""

    plans: Sets
    reason: str
    dwell_left: int | None = None
    """Requests for which the change is put off. None: it is not."""


def choose_sets(situation: Situation, plan: ServedPlan | None, settings: PolicySettings) -> SetChoice:
    """Takes the offered sets unless a single plan is faster by more than `routing_premium`.

    Sets in force stay until a single plan is faster by `min_gain` more than that. They also stay while the
    traffic is new, or the bound is tighter than what is known can hold: then a router serves safely.

    plan: the single plan. It serves requests that are not routed, so it is the first plan of every set that
    has it.
    """
    offer, in_force = situation.offer, situation.plans
    if not situation.free:
        return SetChoice(in_force, "")
    if offer is None:
        says_why = situation.no_offer and (in_force or situation.trigger in _EXPLAINED)
        return SetChoice({}, f"one plan for all: {situation.no_offer}" if says_why else "")
    gain = 1 - offer.seconds / offer.single_seconds
    least = -settings.routing_premium - (settings.min_gain if in_force else 0.0)
    expected = _expected(offer)
    is_new = bool(in_force) and (offer.is_best_effort or offer.unlike_share >= _NEW_TRAFFIC_SHARE)
    if gain < least and not is_new:
        return SetChoice({}, f"one plan for all: {expected}, a gain of {gain:.1%} (needed: {least:.1%})")
    plans = {worker: with_first(its, plan) for worker, its in offer.plans.items()}
    since, is_change = situation.requests_since_move, plans != in_force
    if (
        situation.trigger is Trigger.ROUTING
        and is_change
        and since is not None
        and since < settings.min_dwell_requests
    ):
        left = settings.min_dwell_requests - since
        kept = "the sets in force stay" if in_force else "one plan for all"
        return SetChoice(
            in_force,
            f"{kept}: the last move is {since} requests old, its dwell {settings.min_dwell_requests}",
            left,
        )
    count = len(union(plans))
    verb = "chooses" if is_change else "goes on choosing"
    return SetChoice(plans, f"a router {verb} among {count} plans for each request: {expected}")


def union(plans: Sets) -> frozenset[ServedPlan]:
    """All plans of all sets."""
    return frozenset().union(*plans.values())


def with_first(plans: Iterable[ServedPlan], first: ServedPlan | None) -> tuple[ServedPlan, ...]:
    """A set in a fixed order, with this plan as its first one.

    If the set does not have that plan, the deepest one is the first, of the same model if possible.
    """
    ordered = sorted(plans, key=lambda one: (one.model, one.depth))
    front = max(
        ordered,
        key=lambda one: (one == first, first is not None and one.model == first.model, one.depth),
    )
    return (front, *(one for one in ordered if one != front))


def _expected(offer: SetOffer) -> str:
    served = ""
    if offer.served_surprise is not None and offer.served_error is not None:
        served = (
            f"; served prompts had {offer.served_surprise:+.3f} nats a token more than expected "
            f"(standard error {offer.served_error:.3f})"
        )
    return (
        f"{1e3 * offer.seconds:.3g} ms a token expected, against {1e3 * offer.single_seconds:.3g} ms of "
        f"{offer.single}, the quickest single plan within the bound for the same requests; perplexity "
        f"{offer.increase:+.1%} (standard error {offer.error:.1%}), at {1e6 * offer.price:.3g} us a nat, "
        f"learnt from {offer.examples} examples{served}"
    )
