"""The requests that were routed last, as workers report them."""

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from helios.routing.knowledge import Knowledge
from helios.routing.terms import Recent
from helios.served import ServedPlan
from helios.v1 import worker_pb2

_KEPT = 100
# Of so many last prompts is told how many are unlike all examples.
_UNLIKE_OF_LAST = 16


class Seen(NamedTuple):
    """What the router's knowledge says of a prompt: whether it is unlike all examples, and the best model."""

    is_unlike: bool
    kind: str


class Surprise(NamedTuple):
    """Nats a token of served prompts above what was expected, and the standard error."""

    nats: float
    error: float


@dataclass(frozen=True, slots=True)
class _Judged:
    recent: Recent
    seen: Seen


class RecentPrompts:
    """A ring of the last routed requests. Whenever the knowledge changes, they are judged anew by it."""

    def __init__(self) -> None:
        self._prompts: deque[worker_pb2.ServedPrompt] = deque(maxlen=_KEPT)
        self._judged: deque[_Judged] = deque(maxlen=_KEPT)
        self._knowledge: Knowledge | None = None

    def add(self, prompts: Iterable[worker_pb2.ServedPrompt], knowledge: Knowledge) -> list[Seen]:
        """Adds prompts, the newest last. Returns what the knowledge says of those that were probed."""
        self._judge_by(knowledge)
        seen = []
        for prompt in prompts:
            self._prompts.append(prompt)
            judged = _judge(prompt, knowledge)
            if judged is not None:
                self._judged.append(judged)
                seen.append(judged.seen)
        return seen

    @property
    def prompts(self) -> tuple[worker_pb2.ServedPrompt, ...]:
        """All of them, the newest last."""
        return tuple(self._prompts)

    def recent(self, knowledge: Knowledge) -> list[Recent]:
        """The same as `recent` of all of them, but judges only those anew that must be."""
        self._judge_by(knowledge)
        return _recent(self._judged)

    def surprise(self) -> Surprise | None:
        """None: fewer than two prompts were read out."""
        known = [one.recent for one in self._judged if not one.seen.is_unlike]
        read = [one.surprise for one in known if one.tokens]
        if len(read) < 2:
            return None
        return Surprise(float(np.mean(read)), float(np.std(read, ddof=1)) / math.sqrt(len(read)))

    @property
    def unlike_share(self) -> float:
        """The share of the newest prompts that are unlike all examples."""
        newest = list(self._judged)[-_UNLIKE_OF_LAST:]
        return sum(one.seen.is_unlike for one in newest) / max(len(newest), 1)

    def shares(self) -> dict[ServedPlan, float]:
        """The share of the last requests that each plan got."""
        counts = Counter((one.plan.model, one.plan.depth) for one in self._prompts)
        return {
            ServedPlan(model=model, depth=depth): count / len(self._prompts)
            for (model, depth), count in counts.most_common()
        }

    def _judge_by(self, knowledge: Knowledge) -> None:
        if knowledge is not self._knowledge:
            self._knowledge = knowledge
            self._judged = deque(_judged(self._prompts, knowledge), maxlen=_KEPT)


def recent(prompts: Iterable[worker_pb2.ServedPrompt], knowledge: Knowledge) -> list[Recent]:
    """Those that were probed, for `helios.routing.terms.settle`."""
    return _recent(_judged(prompts, knowledge))


def _recent(judged: Iterable[_Judged]) -> list[Recent]:
    return [one.recent for one in judged]


def _judged(prompts: Iterable[worker_pb2.ServedPrompt], knowledge: Knowledge) -> list[_Judged]:
    return [judged for prompt in prompts if (judged := _judge(prompt, knowledge)) is not None]


def _judge(prompt: worker_pb2.ServedPrompt, knowledge: Knowledge) -> _Judged | None:
    """None: the prompt was not probed with any model of the knowledge."""
    models = knowledge.models
    readings = {
        one.model: one.nats for one in prompt.readings if one.model in models and math.isfinite(one.nats)
    }
    if not readings:
        return None
    plan = ServedPlan(model=prompt.plan.model, depth=prompt.plan.depth)
    per_token = prompt.nats / prompt.tokens if prompt.tokens else 0.0
    found = Recent.of(knowledge, prompt.first_ids, readings, plan, per_token, prompt.tokens)
    return _Judged(found, Seen(found.is_unlike, models[knowledge.kind(found.features, found.first)]))
