"""Chooses a worker for a stream: pure functions of the known facts about the workers."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from helios.routing.ranked_plan import RankedPlan
from helios.served import ServedPlan


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready worker as the router sees it.

    `plans` are those in force, at least one. `sequences` is its load: streams of this gateway and of others.
    `places` is the number of sequences that it runs at once. `seconds_per_place` is the time until one more
    of these becomes free. `free_share` is the free part of its KV blocks, 0 to 1. `suspects` counts streams
    of this gateway under which another worker has failed and which have not settled on this one.
    """

    address: str
    plans: tuple[ServedPlan, ...]
    tokenizer_id: str
    context_tokens: int
    sequences: int
    free_share: float
    suspects: int = 0
    places: int = 1
    seconds_per_place: float = 0.0

    @property
    def wait_seconds(self) -> float:
        """The expected time until one more sequence has a place."""
        return max(0, self.sequences + 1 - self.places) * self.seconds_per_place


@dataclass(frozen=True, slots=True)
class Needs:
    """A stream's requirements for a worker. Empty or 0: no such requirement."""

    models: frozenset[str] = frozenset()
    tokenizer_id: str = ""
    context_tokens: int = 0

    def met_by(self, worker: Candidate) -> bool:
        """Whether the worker can compute this stream."""
        return (
            (not self.models or any(plan.model in self.models for plan in worker.plans))
            and self.tokenizer_id in ("", worker.tokenizer_id)
            and self.context_tokens <= worker.context_tokens
        )


@dataclass(frozen=True, slots=True)
class Ranking:
    """The plans that may serve a stream, none beyond its bound, and the most tokens it may generate."""

    plans: tuple[RankedPlan, ...]
    max_tokens: int

    def best_at(self, plans: Sequence[ServedPlan]) -> RankedPlan | None:
        """The one that costs least of those that are in force at a worker. None: none is."""
        in_force = [one for one in self.plans if one.plan in plans]
        return min(in_force, key=lambda one: one.extra_seconds_per_token, default=None)

    def find(self, plan: ServedPlan) -> RankedPlan | None:
        """The entry of a plan. None: it was not ranked."""
        return next((one for one in self.plans if one.plan == plan), None)


def expected_seconds(worker: Candidate, ranked: RankedPlan, max_tokens: int) -> float:
    """What it costs to serve a stream there under this plan, in seconds over the best plan without a wait.

    It is the wait for a place, and what the plan costs more for all tokens of the stream.
    """
    return worker.wait_seconds + ranked.extra_seconds_per_token * max_tokens


def choose(
    workers: Iterable[Candidate],
    needs: Needs,
    *,
    prefer: ServedPlan | None = None,
    ranking: Ranking | None = None,
    avoid: Set[str] = frozenset(),
    exclude: Set[str] = frozenset(),
    alone: bool = False,
) -> Candidate | None:
    """The worker that takes a stream, or None if none can.

    A new stream goes to the least loaded worker. `avoid` and `exclude` are addresses. An avoided worker is
    used if there is no other, an excluded one never. A stream that continues after a loss names its plan in
    `prefer`, because only the same model and depth continue it with the same tokens. A stream whose plans
    are ranked goes where one of them is in force, and where it costs least (`expected_seconds`). A stream
    that must be the only suspect on its worker (`alone`) goes to a worker without suspects if there is one.
    If the chosen worker has suspects, the caller must wait.
    """

    def cost(worker: Candidate) -> tuple[bool, int, bool, float, int, float, str]:
        distance = 0
        if prefer is not None and prefer not in worker.plans:
            distance = 1 if any(plan.model == prefer.model for plan in worker.plans) else 2
        seconds = 0.0
        if ranking is not None and (best := ranking.best_at(worker.plans)) is not None:
            seconds = expected_seconds(worker, best, ranking.max_tokens)
        return (
            worker.address in avoid,
            distance,
            alone and worker.suspects > 0,
            seconds,
            worker.sequences,
            -worker.free_share,
            worker.address,
        )

    able = (
        worker
        for worker in workers
        if worker.address not in exclude
        and needs.met_by(worker)
        and (ranking is None or ranking.best_at(worker.plans) is not None)
    )
    return min(able, key=cost, default=None)
