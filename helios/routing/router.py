"""Chooses the plan of a request by what a probe of its prompt shows."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helios.errors import InvalidRequestError
from helios.routing.knowledge import VERSION, Knowledge, Numbers
from helios.routing.probe import Probe
from helios.routing.ranked_plan import RankedPlan
from helios.routing.terms import LEAST_UNLIKE, NEIGHBOURS, Terms
from helios.routing.unlike_prompts import UnlikePrompts
from helios.served import ServedPlan
from helios.slo import Objective


class Router(BaseModel):
    """A router: what has been learnt, and the terms of now. Frozen; JSON with a version."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = VERSION
    number: int = Field(ge=1)
    """Grows with every change."""
    knowledge: Knowledge
    terms: Terms

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Raises InvalidRequestError for another version, or anything else that this one cannot use."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidRequestError(f"not a router of version {VERSION}: {error}") from None

    def to_json(self) -> bytes:
        """All that a worker needs of it."""
        return self.model_dump_json(exclude={"knowledge": {"first_expected"}}).encode()

    def first_model(self, first_ids: Sequence[int]) -> str:
        """The model that is probed first. first_ids: the tokens that are probed."""
        return self.knowledge.models[self.knowledge.first_for(first_ids)]

    def rank(
        self,
        probe: Probe,
        *,
        lot: float,
        is_complete: bool,
        max_perplexity_increase: float | None = None,
        objective: Objective | None = None,
        among: Collection[ServedPlan] | None = None,
        unlike: UnlikePrompts | None = None,
    ) -> list[RankedPlan] | None:
        """The plans for a request, the best first: never empty. None: more readings are worth it.

        The others are dearer and expected to be at least as good, for the case that the best is busy.
        lot: in [0, 1), decides between two prices. is_complete: there will be no more readings.
        max_perplexity_increase: a bound for this request alone; the operator's price does not count then.
        objective: LATENCY takes the plan with the soonest tokens within the bound. among: the only plans that
        may be taken, as far as they are known. unlike: the prompts before this one.
        """
        allowed = self._allowed(among)
        known = self.knowledge.models
        read = {model: one.nats for model, one in probe.readings.items() if model in known}
        if not read:
            return [self._safe(allowed, "the prompt is too short to be judged")]
        features = self.knowledge.features_of(probe.first_ids, read)
        first = self.knowledge.first_of(read)
        is_suspect = unlike is not None and unlike.are_likely
        is_unlike = self.knowledge.is_unlike(features, first, is_suspect=is_suspect)
        expected = self.knowledge.expected_nats(features, first)
        price = self.terms.low_price if lot < self.terms.low_share else self.terms.price
        if first is not None and not is_complete:
            is_own_bound = max_perplexity_increase is not None or objective is Objective.LATENCY
            if is_unlike or is_own_bound or self._asks_more(features, first, expected, price, allowed):
                return None
        if is_unlike:
            if not is_complete:
                return None
            return [self._safest(allowed, read, unlike or UnlikePrompts())]
        increases = expected - expected[self.knowledge.deepest].min()
        bound = max_perplexity_increase
        if objective is Objective.LATENCY and bound is None:
            bound = self.terms.bound
        if bound is not None:
            return self._within(bound, increases, objective, allowed)
        losses = self.knowledge.costs + price * expected
        best_at = min(allowed, key=lambda at: losses[at])
        why = f"least time at a price of {price * 1e6:.3g} us a nat"
        if first is not None:
            why += f", by {known[first]} alone"
        # A busy plan's requests may go to plans that are expected to be no worse.
        others = [at for at in allowed if at != best_at and expected[at] <= expected[best_at]]
        return self._ranked([best_at, *others], losses, increases, why)

    @cached_property
    def _by_all(self) -> list[np.ndarray[tuple[int], np.dtype[np.intp]]]:
        """Which plan all readings choose for each example, at the price and at the low price."""
        known = self.knowledge
        prices = (self.terms.price, self.terms.low_price)
        return [(known.costs + price * known.expected_by_all).argmin(axis=1) for price in prices]

    def _asks_more(
        self, features: Numbers, first: int, expected: Numbers, price: float, allowed: Sequence[int]
    ) -> bool:
        """Whether readings of all models would save more than they cost, for examples like this prompt."""
        known = self.knowledge
        near = known.nearest(features, first, NEIGHBOURS)
        chosen = min(allowed, key=lambda at: known.costs[at] + price * expected[at])
        if known.plans[chosen].model != known.models[first]:
            # A text that one model reads badly need not be one that another model reads well.
            return True
        losses = known.costs + price * known.true_nats[near]
        by_all = self._by_all[price != self.terms.price][near]
        worse = (losses[:, chosen] - losses[np.arange(len(near)), by_all]).mean()
        return bool(worse * known.tokens > known.probe.further_seconds)

    def _allowed(self, among: Collection[ServedPlan] | None) -> list[int]:
        plans = self.knowledge.served_plans
        found = [at for at, plan in enumerate(plans) if among is None or plan in among]
        return found or list(range(len(plans)))

    def _safe(self, allowed: Sequence[int], why: str, model: str | None = None) -> RankedPlan:
        """The deepest plan of a model. None: of the usual one."""
        plans, wanted = self.knowledge.plans, model or self.terms.usual_model
        at = max(allowed, key=lambda at: (plans[at].model == wanted, plans[at].depth))
        return RankedPlan(plans[at].plan, 0.0, 0.0, f"{why}: safe plan")

    def _safest(self, allowed: Sequence[int], read: Mapping[str, float], before: UnlikePrompts) -> RankedPlan:
        """The safe plan for a prompt that is unlike all examples.

        Only if others before it were unlike too, they may have something in common.
        """
        best = None
        if before.are_likely:
            read, count = before.mean(read)
            best = self.terms.unlike_model if count < LEAST_UNLIKE else None
        best = best or self.knowledge.safest_model(read)
        found = self._safe(allowed, "the prompt is unlike all that was learnt from", best)
        return replace(found, is_unlike=True)

    def _within(
        self, bound: float, increases: Numbers, objective: Objective | None, allowed: Sequence[int]
    ) -> list[RankedPlan]:
        """The quickest plans within a bound of the request's own."""
        costs = self.knowledge.costs
        if objective is Objective.LATENCY:
            costs = np.array([one.latency_seconds for one in self.knowledge.plans])
        within = [at for at in allowed if increases[at] <= math.log1p(bound)]
        if not within:
            best = min(allowed, key=lambda at: increases[at])
            return self._ranked([best], costs, increases, f"no plan within {bound:.2%}: the best there is")
        within.sort(key=lambda at: costs[at])
        return self._ranked(within, costs, increases, f"the quickest within its own bound of {bound:.2%}")

    def _ranked(
        self, order: Sequence[int], losses: Numbers, increases: Numbers, why: str
    ) -> list[RankedPlan]:
        best = order[0]
        later = sorted(order[1:], key=lambda at: losses[at])
        return [
            RankedPlan(
                self.knowledge.served_plans[at],
                float(max(losses[at] - losses[best], 0.0)),
                math.expm1(float(increases[at])),
                why if at == best else f"next best: {why}",
            )
            for at in (best, *later)
        ]
