"""Which sets of plans the workers' memory holds, and which of them is the best. Pure."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from helios.history import ModelProfile
from helios.orders import EVERY_WORKER
from helios.served import ServedPlan
from services.controller.policy.options import most_sequences
from services.controller.policy.sets import Sets, union
from services.controller.situation import WorkerView

# A plan that fewer requests would get may leave a set where memory is short.
_LEAST_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Layout:
    """The sets of all workers, by worker as in `SetOffer`, and the smallest batch that any of them holds.

    is_short: whether memory, not the engine's own limit, bounds the batch.
    """

    plans: Sets
    batch: int
    is_short: bool

    @property
    def union(self) -> frozenset[ServedPlan]:
        """All plans."""
        return union(self.plans)


_Expected = TypeVar("_Expected")


def choose_set(
    layouts: Sequence[Layout],
    expect: Callable[[Layout], _Expected],
    seconds: Callable[[_Expected], float],
    refused: Collection[frozenset[ServedPlan]] = (),
) -> tuple[Layout, _Expected] | None:
    """The layout with the least expected seconds of a token. None: there is none.

    layouts: the largest first (`layouts_of`). Only if memory is short there, the others are looked at.
    refused: sets that a worker could not load; no set that contains one of them is chosen.
    """
    able = [one for one in layouts if not is_refused(one, refused)]
    if able and able[0] is layouts[0] and not able[0].is_short:
        able = able[:1]
    found = [(one, expect(one)) for one in able]
    return min(found, key=lambda pair: seconds(pair[1]), default=None)


def is_refused(layout: Layout, refused: Collection[frozenset[ServedPlan]]) -> bool:
    """Whether some worker's set contains one that was refused."""
    return any(bad <= set(its) for bad in refused for its in layout.plans.values())


def layouts_of(
    profiles: Sequence[ModelProfile],
    workers: Sequence[WorkerView],
    prompt_tokens: float,
    output_tokens: float,
    shares: Mapping[ServedPlan, float] | None = None,
    barred: Callable[[ModelProfile, int], bool] = lambda *_: False,
) -> list[Layout]:
    """What these workers' memory holds: all exits of all models first, then those of fewer models.

    prompt_tokens, output_tokens: of a mean request. shares: of the recent requests that each plan would get;
    None: not known. barred: which depths of a model may not be served. Every model of a layout
    is served with all its layers somewhere.
    """
    context = prompt_tokens + output_tokens / 2
    found = []
    for count in range(len(profiles), 0, -1):
        for models in itertools.combinations(profiles, count):
            sets = [
                [ServedPlan(model=one.model, depth=at.depth) for at in one.exits if not barred(one, at.depth)]
                for one in models
            ]
            # The deepest plan is the safe one.
            if any(
                not plans or plans[-1].depth != one.full.depth
                for one, plans in zip(models, sets, strict=True)
            ):
                continue
            whole = _layout(models, [plan for plans in sets for plan in plans], workers, context)
            found += [whole] if whole is not None else []
            if whole is not None and whole.is_short and shares is not None:
                deepest = {plans[-1] for plans in sets}
                kept = [
                    plan
                    for plans in sets
                    for plan in plans
                    if plan in deepest or shares.get(plan, 0.0) >= _LEAST_SHARE
                ]
                lean = _layout(models, kept, workers, context)
                found += [lean] if lean is not None and lean.union < whole.union else []
    return found


def refit(
    plans: Sets, profiles: Sequence[ModelProfile], workers: Sequence[WorkerView], context_tokens: float
) -> Layout | None:
    """The layout that is in force. None: memory no longer holds it, or a plan of it is not profiled."""
    by_name = {one.model: one for one in profiles}
    known = all(
        one.model in by_name and by_name[one.model].find_exit(one.depth) is not None for one in union(plans)
    )
    batches = []
    for worker in workers if known else ():
        its = plans.get(worker.worker_id) or plans.get(EVERY_WORKER) or ()
        batches.append((_batch(by_name, its, worker, context_tokens), worker.max_running) if its else (0, 1))
    if not batches or any(batch < 1 for batch, _ in batches):
        return None
    return Layout(plans, min(batch for batch, _ in batches), any(batch < most for batch, most in batches))


def _layout(
    models: Sequence[ModelProfile],
    plans: Sequence[ServedPlan],
    workers: Sequence[WorkerView],
    context: float,
) -> Layout | None:
    """Gives each worker as many of the models as it holds. None: some model is held nowhere."""
    by_name = {one.model: one for one in models}
    held: dict[str, tuple[ServedPlan, ...]] = {}
    covered: set[str] = set()
    batches, is_short = [], False
    for worker in workers:
        best = max(
            (
                (names, batch)
                for names in _subsets(list(by_name))
                if (batch := _batch(by_name, [one for one in plans if one.model in names], worker, context))
                > 0
            ),
            # Models that no other worker holds come first.
            key=lambda one: (len(one[0]), len(set(one[0]) - covered), one[1]),
            default=None,
        )
        if best is None:
            return None
        names, batch = best
        covered |= set(names)
        held[worker.worker_id] = tuple(one for one in plans if one.model in names)
        batches.append(batch)
        is_short |= batch < worker.max_running or len(names) < len(models)
    if not batches or covered != set(by_name):
        return None
    # A worker that comes later gets what most have.
    usual = Counter(held.values()).most_common(1)[0][0]
    others = {worker: its for worker, its in held.items() if its != usual}
    return Layout({EVERY_WORKER: usual, **others}, min(batches), is_short)


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for count in range(len(names), 0, -1):
        yield from itertools.combinations(names, count)


def _batch(
    by_name: Mapping[str, ModelProfile], plans: Sequence[ServedPlan], worker: WorkerView, context: float
) -> int:
    """Sequences that fit beside the weights of every model at its deepest plan, with KV of the mean depth."""
    deepest = {one.model: max(other.depth for other in plans if other.model == one.model) for one in plans}
    weights = sum(by_name[model].at(depth).weight_bytes for model, depth in deepest.items())
    kv = fmean(by_name[one.model].at(one.depth).kv_bytes_per_token for one in plans)
    return most_sequences(worker, weights, kv * context)
