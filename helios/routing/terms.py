"""The price of quality: how many seconds a nat is worth, so that the operator's bound holds.

Each request gets the plan with the least seconds + price x nats. The right price depends on the traffic, so
it is found anew from the most recent requests. Each of them stands for the examples that are like it. Their
true nats show what every price would have led to.

Requests of the same kind change their plan at nearly the same price, so a single price is often too high or
too low for the bound. Then a share of the requests gets a lower price than the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from helios.routing.knowledge import Knowledge, Numbers
from helios.served import ServedPlan

# Prices that are tried, in times of the dearest plan's seconds.
_PRICES = np.geomspace(0.02, 200, 48)
# The bound must hold over the newest requests, and over more of them. The first tell soon that the traffic
# has changed, and the others keep chance out.
WINDOWS = (16, 48)
# The newest requests are of other kinds if the share of one differs by so many standard errors.
_CHANGED_SIGMAS = 1.5
# Examples that stand for one recent request.
_ALIKE = 40
# The reference is the best model over all requests, so in a mix requests may exceed what their own best model
# needs. A few requests that are taken for others by mistake must not look like a mix. So a small minority's
# share counts as this many standard errors smaller, and smaller by this constant, and without as many as are
# taken for it among the examples.
_SLACK_SIGMAS, _LEAST_SHARE = 1.5, 0.02
# Requests with the low price may exceed the best model by this share at most, in the mean. Otherwise a few
# requests would be served badly so that all others can be served well.
_MOST_INCREASE = 0.3
# What is expected counts as so many standard errors worse, because few examples can be lucky ones.
_CAUTION_SIGMAS = 0.5
# A bound below what can be had is replaced by the best that can be had plus this, in nats.
_TOLERANCE = 0.004
# Examples whose loss shows whether further readings are worth their seconds.
NEIGHBOURS = 10
# So many recent prompts that are unlike all examples show together which model reads them best.
LEAST_UNLIKE = 3
# Standard deviation of what examples and served prompts may differ by, in nats. Served prompts correct the
# price as far as they are more certain than that.
_BIAS_DEVIATION = 0.02
# Prompts that are read better than expected relax the bound by so many nats at most.
_MOST_RELIEF = 0.01


class Terms(BaseModel):
    """On what terms plans are chosen now. Prices are in seconds per nat (a token)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    usual_model: str
    """The model that is expected to read most of the recent requests best."""
    price: float = Field(ge=0)
    low_price: float = Field(ge=0)
    low_share: float = Field(ge=0, le=1)
    """Share of the requests with the low price."""
    bound: float = Field(ge=0)
    """The bound on the rise of perplexity over the best model with all layers, a share."""
    increase: float
    """The rise that is expected of the next requests, if they are like the recent ones. A share."""
    error: float = Field(ge=0)
    """Its standard error."""
    is_best_effort: bool = False
    """Whether no price can hold the bound."""
    unlike_model: str | None = None
    """The model whose deepest plan serves prompts that are unlike all examples. None: each shows its own."""
    seconds: float = Field(0.0, ge=0)
    """Seconds that a token is expected to cost, probes included."""


@dataclass(frozen=True, slots=True)
class Recent:
    """A request that was routed.

    features: standardised (`Knowledge.features_of`). first: index of the model whose reading alone is known;
    None: all are. surprise: nats per token above what was expected, over `tokens` read tokens. is_unlike: it
    is unlike all examples, so it got a safe plan at any price.
    """

    features: Numbers
    first: int | None
    surprise: float = 0.0
    tokens: int = 0
    is_unlike: bool = False

    @classmethod
    def of(
        cls,
        knowledge: Knowledge,
        first_ids: Sequence[int],
        readings: Mapping[str, float],
        plan: ServedPlan,
        nats: float,
        tokens: int,
    ) -> Self:
        """A request as a knowledge sees it.

        first_ids, readings: what its probe showed, readings in nats by model, at least one. nats: per token,
        of the `tokens` tokens of its rest that were read under `plan`. They only count if the knowledge has
        the plan.
        """
        features, first = knowledge.features_of(first_ids, readings), knowledge.first_of(readings)
        surprise, at = 0.0, knowledge.plan_index.get(plan)
        if at is None or not tokens or not math.isfinite(nats):
            tokens = 0
        else:
            surprise = nats - float(knowledge.expected_nats(features, first)[at])
        return cls(features, first, surprise, tokens, knowledge.is_unlike(features, first))


class _Offer(NamedTuple):
    """What a price, or a mix of two, leads to over all weighted examples. The first is the sort key."""

    seconds: float
    low: int
    high: int
    low_share: float
    nats: float
    error: float
    is_best_effort: bool


def settle(knowledge: Knowledge, recent: Sequence[Recent], bound: float) -> Terms:
    """The terms for requests like the recent ones (newest last). Without any: terms for whatever may come."""
    unlike_model = _unlike_model(knowledge, recent)
    recent = [one for one in recent if not one.is_unlike]
    kinds = [knowledge.kind(one.features, one.first) for one in recent]
    newest = kinds[-max(WINDOWS) :] or list(range(len(knowledge.models)))
    usual = max(set(newest), key=newest.count)
    if not knowledge.outcomes:
        knowledge.outcomes.append(_outcomes(knowledge))
    seconds, nats = knowledge.outcomes[0]
    if len(recent) < WINDOWS[0]:
        # What will come is not known, so no mix may be counted on.
        weights = [
            (knowledge.best_models == kind).astype(float) for kind in set(knowledge.best_models.tolist())
        ]
    else:
        windows = _windows(kinds)
        recent_kinds = kinds[-max(windows) :]
        alike = _alike(knowledge, recent[-max(windows) :], recent_kinds)
        weights = [_weights(knowledge, alike[-window:], recent_kinds[-window:]) for window in windows]
    allowed = math.log1p(bound) - _bias(recent)
    offers = [_cheapest(knowledge, one, seconds, nats, allowed) for one in weights]
    offer = max(offers)
    prices = _PRICES * knowledge.costs.max()
    return Terms(
        usual_model=knowledge.models[usual],
        price=float(prices[offer.high]),
        low_price=float(prices[offer.low]),
        low_share=offer.low_share,
        bound=bound,
        increase=math.expm1(offer.nats),
        error=math.exp(offer.nats) * offer.error,
        is_best_effort=offer.is_best_effort,
        unlike_model=unlike_model,
        seconds=offer.seconds,
    )


def _unlike_model(knowledge: Knowledge, recent: Sequence[Recent]) -> str | None:
    """The model that probably reads recent unlike prompts best, by all their readings together."""
    unlike = [one.features for one in recent[-max(WINDOWS) :] if one.is_unlike and one.first is None]
    if len(unlike) < LEAST_UNLIKE:
        return None
    means = knowledge.readings_of(np.array(unlike)).mean(axis=0)
    return knowledge.safest_model(dict(zip(knowledge.models, means.tolist(), strict=True)))


def _bias(recent: Sequence[Recent]) -> float:
    """By how many nats served prompts exceed what was expected, shrunk by its uncertainty."""
    read = [one for one in recent if one.tokens]
    if len(read) < 2:
        return 0.0
    surprises = np.array([one.surprise for one in read])
    variance = surprises.var(ddof=1) / len(read)
    found = float(surprises.mean() * _BIAS_DEVIATION**2 / (_BIAS_DEVIATION**2 + variance))
    return max(found, -_MOST_RELIEF)


def _outcomes(knowledge: Knowledge) -> tuple[Numbers, Numbers]:
    """Seconds and nats of a token of each example at every price, probes included: [prices, examples]."""
    costs, nats = knowledge.costs, knowledge.true_nats
    rows, probe, firsts = np.arange(len(nats)), knowledge.probe, knowledge.firsts
    is_single = len(knowledge.models) == 1
    near = _neighbours(knowledge)
    model_of = np.array([knowledge.models.index(one.model) for one in knowledge.plans])
    seconds, found = (np.empty((len(_PRICES), len(nats))) for _ in range(2))
    for at, price in enumerate(_PRICES * costs.max()):
        by_all = (costs + price * knowledge.expected_by_all).argmin(axis=1)
        chosen, extra = by_all, np.zeros(len(nats))
        if not is_single:
            by_first = (costs + price * knowledge.expected_by_first[firsts, rows]).argmin(axis=1)
            loss = costs + price * nats
            # How much worse the choice from one reading is for the examples that are like this one.
            worse = (loss[near, by_first[:, None]] - loss[near, by_all[near]]).mean(axis=1)
            # Another model than the one that was read is never chosen unread.
            asks = (worse * knowledge.tokens > probe.further_seconds) | (model_of[by_first] != firsts)
            chosen, extra = np.where(asks, by_all, by_first), asks * probe.further_seconds
        seconds[at] = costs[chosen] + (probe.first_seconds + extra) / knowledge.tokens
        found[at] = nats[rows, chosen]
    return seconds, found


def _neighbours(knowledge: Knowledge) -> NDArray[np.intp]:
    """For each example, the others that are nearest by its first model's reading: [examples, NEIGHBOURS]."""
    count = min(NEIGHBOURS, len(knowledge.known_features) - 1)
    found = np.empty((len(knowledge.known_features), count), dtype=np.intp)
    for first in set(knowledge.firsts.tolist()):
        features = knowledge.known_features[:, knowledge.columns(first)]
        rows = np.nonzero(knowledge.firsts == first)[0]
        away = ((features[rows][:, None] - features[None]) ** 2).sum(axis=2)
        away[np.arange(len(rows)), rows] = np.inf
        found[rows] = np.argsort(away, axis=1)[:, :count]
    return found


def _windows(kinds: Sequence[int]) -> tuple[int, ...]:
    """The windows over which the bound must hold. kinds: of the recent requests, the newest last.

    Where the newest requests are of the same kinds as all others, but for chance, all tell together.
    """
    short, long = (kinds[-window:] for window in WINDOWS)
    for kind in set(long):
        share = long.count(kind) / len(long)
        chance = math.sqrt(share * (1 - share) / len(short))
        if abs(short.count(kind) / len(short) - share) > _CHANGED_SIGMAS * chance:
            return WINDOWS
    return (max(WINDOWS),)


def _alike(knowledge: Knowledge, recent: Sequence[Recent], kinds: Sequence[int]) -> list[NDArray[np.intp]]:
    """For each request the examples of its kind that are most like it."""
    found: list[NDArray[np.intp]] = [np.empty(0, dtype=np.intp)] * len(recent)
    groups: dict[tuple[int, int | None], list[int]] = {}
    for at, (one, kind) in enumerate(zip(recent, kinds, strict=True)):
        groups.setdefault((kind, one.first), []).append(at)
    for (kind, first), members in groups.items():
        of_kind = np.nonzero(knowledge.best_models == kind)[0]
        of_kind = of_kind if len(of_kind) else np.arange(len(knowledge.true_nats))
        columns = knowledge.columns(first)
        features = np.array([recent[at].features[columns] for at in members])
        known = knowledge.known_features[of_kind][:, columns]
        away = ((features[:, None] - known) ** 2).sum(axis=2)
        count = min(_ALIKE, len(of_kind))
        nearest = np.argpartition(away, count - 1, axis=1)[:, :count]
        for at, its in zip(members, of_kind[nearest], strict=True):
            found[at] = its
    return found


def _weights(knowledge: Knowledge, alike: Sequence[NDArray[np.intp]], kinds: Sequence[int]) -> Numbers:
    """How much each example counts: [examples], with a sum of at most 1.

    alike: for each request the examples that stand for it; kinds: theirs.
    """
    found = np.zeros(len(knowledge.true_nats))
    for kind in set(kinds):
        weights = np.zeros(len(found))
        for one in (one for one, its in zip(alike, kinds, strict=True) if its == kind):
            weights[one] += 1.0
        share = kinds.count(kind) / len(kinds)
        if share < 1 / 2:
            doubt = _SLACK_SIGMAS * math.sqrt(share * (1 - share) / len(kinds)) + _LEAST_SHARE
            usual = max(set(kinds), key=kinds.count)
            taken = float(knowledge.confusion[usual, kind]) * kinds.count(usual) / len(kinds)
            share -= (1 - 2 * share) * doubt + taken
        found += max(share, 0.0) * weights / weights.sum()
    return found


def _cheapest(
    knowledge: Knowledge, weights: Numbers, seconds: Numbers, nats: Numbers, allowed: float
) -> _Offer:
    """The cheapest price, or mix of two, whose nats exceed the best model's by at most `allowed`."""
    weights = weights / weights.sum()
    # [examples]: nats of the model that is best over all of them.
    deepest = knowledge.true_nats[:, knowledge.deepest]
    best = deepest[:, int((weights @ deepest).argmin())]
    costs, excess = seconds @ weights, (nats - best) @ weights
    errors = _errors(knowledge, weights, nats - best)
    excess = excess + _CAUTION_SIGMAS * errors
    is_best_effort = bool(excess.min() > allowed)
    allowed = max(allowed, float(excess.min()) + _TOLERANCE)
    within = np.nonzero(excess <= allowed)[0]
    beyond = np.nonzero((excess > allowed) & (excess <= max(allowed, math.log1p(_MOST_INCREASE))))[0]
    high = int(within[costs[within].argmin()])
    low, share, cost = high, 0.0, costs[high]
    if len(beyond):
        shares = (allowed - excess[within]) / (excess[beyond][:, None] - excess[within])
        mixes = shares * costs[beyond][:, None] + (1 - shares) * costs[within]
        row, column = np.unravel_index(int(mixes.argmin()), mixes.shape)
        if mixes[row, column] < cost:
            low, high = int(beyond[row]), int(within[column])
            share, cost = float(shares[row, column]), mixes[row, column]
    each = share * nats[low] + (1 - share) * nats[high] - best
    mean = float(weights @ each)
    error = float(_errors(knowledge, weights, each[None])[0])
    return _Offer(float(cost), low, high, share, mean, error, is_best_effort)


def _errors(knowledge: Knowledge, weights: Numbers, excess: Numbers) -> Numbers:
    """Standard errors of the weighted means of `excess`, [rows, examples]: [rows].

    What models differ by from kind to kind is no chance, because the share of each kind is known.
    """
    squares = np.zeros(len(excess))
    for kind in set(knowledge.best_models.tolist()):
        of_kind = knowledge.best_models == kind
        its, share = weights[of_kind], float(weights[of_kind].sum())
        if share > 0:
            away = excess[:, of_kind] - (excess[:, of_kind] @ its / share)[:, None]
            squares += (its**2 * away**2).sum(axis=1)
    return np.asarray(np.sqrt(squares))
