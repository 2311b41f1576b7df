"""What is expected of a router with a set of plans: its terms, and what each plan would get. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from helios.history import ModelProfile
from helios.routing.example import Example
from helios.routing.knowledge import Knowledge
from helios.routing.terms import WINDOWS, Recent, Terms, settle
from helios.served import ServedPlan
from helios.slo import Objective
from services.controller.routing.costs import plan_cost, probe_cost, quickest_within
from services.controller.routing.plan_sets import Layout


@dataclass(frozen=True, slots=True)
class Demand:
    """The requests of now: tokens of a mean one, and sequences at each worker."""

    prompt_tokens: float
    output_tokens: float
    load: int
    objective: Objective


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is expected of a router with a layout.

    single: the quickest plan that alone would keep the bound for the same requests, and its seconds of a
    token.
    """

    layout: Layout
    knowledge: Knowledge
    terms: Terms
    shares: Mapping[ServedPlan, float]
    single: ServedPlan
    single_seconds: float


def usable(examples: Sequence[Example], profiles: Mapping[str, ModelProfile]) -> list[Example]:
    """The examples that have nats of every profiled exit. Others are of another version of a model."""
    return [
        one
        for one in examples
        if all(len(one.rest_nats.get(name, ())) == len(profile.exits) for name, profile in profiles.items())
    ]


def learn(
    examples: Sequence[Example], layout: Layout, profiles: Mapping[str, ModelProfile], demand: Demand
) -> Knowledge:
    """Learns a router for the plans of a layout. examples: at least two, usable with these profiles."""
    plans = sorted(layout.union, key=lambda one: (one.model, one.depth))
    models = dict.fromkeys(one.model for one in plans)
    costs = [
        plan_cost(
            profiles[plan.model],
            plan,
            batch=layout.batch,
            load=demand.load,
            prompt_tokens=demand.prompt_tokens,
            output_tokens=demand.output_tokens,
            objective=demand.objective,
        )
        for plan in plans
    ]
    probed = float(np.mean([one.first_tokens for one in examples]))
    return Knowledge.learn(
        examples,
        costs,
        {name: [at.depth for at in profiles[name].exits] for name in models},
        probe_cost([profiles[name] for name in models], probed),
        # Costs are per generated token.
        demand.output_tokens,
    )


def expect(
    knowledge: Knowledge,
    layout: Layout,
    recent: Sequence[Recent],
    bound: float,
    single_seconds: Mapping[ServedPlan, float],
) -> Expectation:
    """What is expected for requests like the recent ones. If those are few: like the newest examples.

    single_seconds: seconds of a token under each plan if it alone is served.
    """
    recent = [one for one in recent if not one.is_unlike]
    if len(recent) < WINDOWS[0]:
        recent = [Recent(features, None) for features in knowledge.known_features[-max(WINDOWS) :]]
    terms = settle(knowledge, recent, bound)
    expected = np.array([knowledge.expected_nats(one.features, one.first) for one in recent])
    means = expected.mean(axis=0)
    best = means[knowledge.deepest].min()
    plans = [one.plan for one in knowledge.plans]
    single = quickest_within(
        {plan: float(nats - best) for plan, nats in zip(plans, means, strict=True)},
        single_seconds,
        math.log1p(bound),
    )
    costs = knowledge.costs
    high, low = ((costs + price * expected).argmin(axis=1) for price in (terms.price, terms.low_price))
    count = len(expected)
    shares = {
        plan: float(
            (terms.low_share * (low == at).sum() + (1 - terms.low_share) * (high == at).sum()) / count
        )
        for at, plan in enumerate(plans)
    }
    return Expectation(layout, knowledge, terms, shares, single, single_seconds[single])
