"""The order in which workers move."""

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import cast

from helios.served import ServedPlan
from services.controller.fleet import Worker
from services.controller.reload import named
from services.controller.rollout import Plans, move_overlapping, next_to_move

PLANS = (ServedPlan(model="small", depth=4),)


class Workers:
    """Three workers. A test ends their moves; those in `refusing` cannot load the plan."""

    def __init__(self, refusing: str = "") -> None:
        self.names = ["a", "b", "c"]
        self.refusing = refusing
        self.begun: list[str] = []
        self.loads = {name: asyncio.Event() for name in self.names}
        self.ends = {name: asyncio.Event() for name in self.names}

    def following(self, besides: Collection[str]) -> tuple[Worker, Plans] | None:
        left = [name for name in self.names if name not in besides]
        # Only the part of a worker that the rollout reads.
        return (cast("Worker", SimpleNamespace(worker_id=left[0])), PLANS) if left else None

    async def move(self, worker: Worker, plans: Plans, loaded: asyncio.Event) -> bool:
        self.begun.append(worker.worker_id)
        await self.loads[worker.worker_id].wait()
        if worker.worker_id == self.refusing:
            return False
        loaded.set()
        await self.ends[worker.worker_id].wait()
        return True


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_worker_begins_when_the_one_before_has_loaded() -> None:
    workers = Workers()
    moving = asyncio.create_task(move_overlapping(workers.following, workers.move))
    await settle()
    assert workers.begun == ["a"]
    workers.loads["a"].set()
    await settle()
    # The sequences of the first worker still move.
    assert workers.begun == ["a", "b"]
    for event in (*workers.loads.values(), *workers.ends.values()):
        event.set()
    assert await moving
    assert workers.begun == ["a", "b", "c"]


async def test_no_worker_begins_after_one_that_refused() -> None:
    workers = Workers(refusing="b")
    moving = asyncio.create_task(move_overlapping(workers.following, workers.move))
    for event in (*workers.loads.values(), workers.ends["a"]):
        event.set()
    assert not await moving
    assert workers.begun == ["a", "b"]


async def test_no_worker_moves_where_all_are_where_they_should_be() -> None:
    workers = Workers()
    workers.names.clear()
    assert not await move_overlapping(workers.following, workers.move)


async def test_moves_end_with_the_rollout() -> None:
    workers = Workers()
    moving = asyncio.create_task(move_overlapping(workers.following, workers.move))
    await settle()
    moving.cancel()
    await asyncio.wait({moving}, timeout=5)
    assert moving.cancelled()


def worker(name: str, *plans: ServedPlan, is_serving: bool = True) -> Worker:
    """Only the part of a worker that the choice reads."""
    return cast(
        "Worker",
        SimpleNamespace(worker_id=name, plans=plans, plan=plans[0] if plans else None, is_serving=is_serving),
    )


def test_sets_are_compared_by_their_plans_and_the_first_one() -> None:
    two, four, six = (ServedPlan(model="small", depth=depth) for depth in (2, 4, 6))
    for served, moves in (
        ((four, two, six), False),
        ((four, six, two), False),
        ((two, four, six), True),
        ((four, two), True),
        ((four,), True),
    ):
        one = worker("a", *served)
        expected = (one, (four, two, six)) if moves else None
        assert next_to_move([one], lambda _: (four, two, six), 1) == expected, served
    assert next_to_move([worker("a", two)], lambda _: (), 1) is None, "it keeps its plans"


def test_plans_are_named_by_model() -> None:
    plans = [ServedPlan(model=model, depth=depth) for model, depth in (("b", 6), ("a", 2), ("b", 2))]
    assert named(plans) == "b at depths 2, 6, a at depth 2"
    assert named(plans[:1]) == "b at depth 6"
