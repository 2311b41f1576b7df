"""Requests that were served, and the quality that they got: each is judged by the plan that served it.

A request's quality is that of its plan on the rest of its own prompt. It is compared with the candidate that
is best, with all its layers, over all requests of the same phase.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.load.clients import Stream
from helios.served import ServedPlan

# A window of requests lasts at least this many seconds, and has at least so many judged requests.
WINDOW_SECONDS, WINDOW_REQUESTS = 1.0, 16


@dataclass(frozen=True, slots=True)
class Quality:
    """What the plan of a request says of the rest of its prompt. Nats are means per token.

    nats: under the plan. agreement: share of tokens where its top token is that of its model's last layer.
    full_nats: under each candidate with all its layers, in the judge's order.
    """

    nats: float
    agreement: float
    full_nats: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """A request that was served. `opened` is in seconds of the monotonic clock.

    tokens: how many of its tokens each plan generated. quality: None if it was not judged.
    """

    opened: float
    tokens: Mapping[ServedPlan, int]
    quality: Quality | None = None

    @property
    def total(self) -> int:
        """The number of its tokens."""
        return sum(self.tokens.values())


@dataclass(frozen=True, slots=True)
class Rise:
    """The relative rise of perplexity of some requests over one candidate, and its standard error.

    agreement: mean over the requests. judged: how many of them were judged. NaN: none.
    """

    increase: float
    error: float
    agreement: float
    judged: int


@dataclass(frozen=True, slots=True)
class PlanShare:
    """The part of the tokens that a plan generated."""

    model: str
    depth: int
    share: float


@dataclass(frozen=True, slots=True)
class Window:
    """Requests of one phase that were opened one after the other. `began` is when the first one was."""

    phase: str
    began: float
    tokens: int
    shares: tuple[PlanShare, ...]
    rise: Rise


def served_of(stream: Stream, quality: Quality | None = None) -> Served:
    """The request of a stream."""
    plans = {ServedPlan(model=model, depth=depth): count for (model, depth), count in stream.exits.items()}
    return Served(stream.opened, plans, quality)


def best_of(requests: Iterable[Served]) -> int:
    """The candidate with the fewest nats over the judged ones of these requests, with all its layers."""
    full = [one.total * np.array(one.quality.full_nats) for one in requests if one.quality is not None]
    return int(np.sum(full, axis=0).argmin()) if full else 0


def rise(requests: Iterable[Served], reference: int) -> Rise:
    """How far the judged ones of these requests exceed a candidate's perplexity. Tokens weigh alike."""
    return rise_over([(one, reference) for one in requests])


def rise_over(compared: Iterable[tuple[Served, int]]) -> Rise:
    """The same for requests that are compared with different candidates."""
    judged = [
        (one.total, one.quality.nats - one.quality.full_nats[reference], one.quality.agreement)
        for one, reference in compared
        if one.quality is not None and one.tokens
    ]
    if not judged:
        return Rise(math.nan, math.nan, math.nan, 0)
    weights, excess, agreement = np.array(judged).T
    weights /= weights.sum()
    mean = float(weights @ excess)
    error = math.sqrt(float((weights**2) @ (excess - mean) ** 2))
    return Rise(math.expm1(mean), math.exp(mean) * error, float(weights @ agreement), len(judged))


def windows(phase: str, requests: Sequence[Served], reference: int) -> list[Window]:
    """The requests of a phase in windows, in the order in which they were opened."""
    groups: list[list[Served]] = [[]]
    for one in sorted(requests, key=lambda one: one.opened):
        group = groups[-1]
        if group and _is_full(group, one.opened):
            groups.append(group := [])
        group.append(one)
    if len(groups) > 1 and not _is_full(groups[-1], math.inf):
        last = groups.pop()
        groups[-1] += last
    return [_window(phase, group, reference) for group in groups if group]


def tokens_within(found: Iterable[Window], bound: float) -> int:
    """The tokens of windows whose perplexity is within the bound."""
    return sum(window.tokens for window in found if window.rise.increase <= bound)


def _is_full(group: Sequence[Served], now: float) -> bool:
    judged = sum(one.quality is not None for one in group)
    return now - group[0].opened >= WINDOW_SECONDS and judged >= WINDOW_REQUESTS


def _window(phase: str, group: Sequence[Served], reference: int) -> Window:
    tokens = Counter[tuple[str, int]]()
    for plan, count in itertools.chain.from_iterable(one.tokens.items() for one in group):
        tokens[plan.model, plan.depth] += count
    total = tokens.total()
    shares = tuple(PlanShare(model, depth, count / total) for (model, depth), count in sorted(tokens.items()))
    return Window(phase, group[0].opened, total, shares, rise(group, reference))
