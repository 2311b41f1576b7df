"""Moves workers to their plans one after the other. Halts at the first that fails.

A worker's plans are a single one, or a set from which a router chooses.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from helios.errors import HeliosError
from helios.served import ServedPlan
from services.controller.fleet import Fleet, Worker
from services.controller.history import History
from services.controller.news import News
from services.controller.reload import Reloaded, WorkerLostError, named, reload, serves
from services.controller.replica import Replica
from services.controller.settings import ControllerSettings

log = logging.getLogger(__name__)

# The plans of one worker, the first one first. Never empty.
Plans: TypeAlias = tuple[ServedPlan, ...]


@dataclass(slots=True)
class Progress:
    """The progress of the last plan's rollout."""

    # Whether the plan that is served until then probably breaks its bounds.
    urgent: bool = False
    reload_seconds: float = 0.0
    stall_seconds: float = 0.0
    sequences_moved: int = 0
    # Where and why the rollout halted. Empty while it continues. `lost` is the id of the worker whose return
    # ends the halt.
    halted: str = ""
    lost: str = ""

    def add(self, moved: Reloaded) -> None:
        """Adds one worker's reload."""
        self.reload_seconds += moved.seconds
        self.stall_seconds = max(self.stall_seconds, moved.stall_seconds)
        self.sequences_moved += moved.sequences_moved

    def halt(self, worker: Worker, plans: Plans, error: HeliosError) -> None:
        """Halts the rollout at this worker, with the reason."""
        self.halted = f"the rollout of {named(plans)} halted at {worker.worker_id}: {error.message}"
        self.lost = worker.worker_id if isinstance(error, WorkerLostError) else ""
        log.warning("%s", self.halted)

    def go_on(self) -> None:
        """Ends a halt."""
        self.halted = self.lost = ""


class Rollout:
    """Moves each worker to its wanted plan while this replica leads."""

    def __init__(
        self,
        settings: ControllerSettings,
        fleet: Fleet,
        replica: Replica,
        history: History,
        on_halt: Callable[[Worker, Plans, HeliosError], Awaitable[None]],
    ) -> None:
        """`on_halt` is called with the reason when a worker has failed to move to its plans."""
        self._settings = settings
        self._fleet = fleet
        self._replica = replica
        self._history = history
        self._on_halt = on_halt
        self.progress = Progress()
        self._moving = asyncio.Lock()
        self._news = News()

    async def run(self) -> None:
        """Moves workers one after the other, as long as none fails, until cancelled."""
        while True:
            self._go_on_after_loss()
            moved = False
            if not self.progress.halted:
                async with self._moving:
                    moved = await self._move_next()
            if not moved:
                await self._news.wait(self._settings.telemetry_seconds)

    def begin(self, *, urgent: bool = False) -> None:
        """Begins a rollout of the wanted plans. `urgent`: the plan served now probably breaks its bounds."""
        self.progress = Progress(urgent=urgent)
        self._news.tell()

    @property
    def is_moving(self) -> bool:
        """Whether workers are moving to a plan, or failed to."""
        return bool(self.progress.halted) or self._following() is not None

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Within the block no worker is moved, except by `bring`."""
        async with self._moving:
            yield

    async def bring(self, worker: Worker, plan: ServedPlan) -> None:
        """Moves a worker to a plan at once. Raises the errors of `reload`."""
        if not serves(worker, (plan,)):
            thresholds = self._history.thresholds((plan,))
            await reload(worker, (plan,), self._settings.reload_timeout_seconds, thresholds)

    def _go_on_after_loss(self) -> None:
        """Ends a halt at a lost worker once that worker answers again."""
        lost = self._fleet.find(self.progress.lost)
        if self.progress.halted and lost is not None and lost.is_serving:
            log.info("%s answers again, the rollout goes on", lost.worker_id)
            self.progress.go_on()

    async def _move_next(self) -> bool:
        """Moves the next worker, or all remaining ones if urgent. Returns whether any move succeeded."""
        if self.progress.urgent:
            return await move_overlapping(self._following, self._move)
        found = self._following()
        return found is not None and await self._move(*found)

    async def _move(self, worker: Worker, plans: Plans, loaded: asyncio.Event | None = None) -> bool:
        """Returns whether the move succeeded. `loaded` is set when the worker has loaded the plans."""
        try:
            moved = await reload(
                worker,
                plans,
                self._settings.reload_timeout_seconds,
                self._history.thresholds(plans),
                urgent=self.progress.urgent,
                loaded=loaded,
            )
        except HeliosError as error:
            self.progress.halt(worker, plans, error)
            await self._on_halt(worker, plans, error)
            return False
        self.progress.add(moved)
        return True

    def _following(self, besides: Collection[str] = ()) -> tuple[Worker, Plans] | None:
        """The worker to move next and its plans, except those in `besides`."""
        if not self._replica.is_leading:
            return None

        def wanted(worker_id: str) -> Plans:
            return () if worker_id in besides else self._wanted(worker_id)

        return next_to_move(self._fleet.workers, wanted, self._settings.min_ready)

    def _wanted(self, worker_id: str) -> Plans:
        if self._settings.mode == "active":
            return self._replica.state.wanted_plans(worker_id)
        # Pins of operators apply in every mode.
        pin = self._replica.state.pin_of(worker_id)
        return () if pin is None else (pin,)


async def move_overlapping(
    following: Callable[[Collection[str]], tuple[Worker, Plans] | None],
    move: Callable[[Worker, Plans, asyncio.Event], Coroutine[Any, Any, bool]],
) -> bool:
    """Moves all workers that must move. Each begins once the one before has loaded its plans.

    Only loading may fail, so the next worker can begin while sequences of the one before still move.
    following: the next worker and its plans, except for the given workers. move: returns whether the worker
    succeeded, and sets the event when it has loaded the plans. Returns whether workers moved and none failed.
    """
    moves: dict[str, asyncio.Task[bool]] = {}
    async with asyncio.TaskGroup() as group:
        while (found := following(moves)) is not None:
            worker, plans = found
            loaded = asyncio.Event()
            moves[worker.worker_id] = moving = group.create_task(move(worker, plans, loaded))
            waiting = group.create_task(loaded.wait())
            await asyncio.wait({moving, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if any(one.done() and not one.result() for one in moves.values()):
                break
    return bool(moves) and all(one.result() for one in moves.values())


def next_to_move(
    workers: Sequence[Worker], wanted: Callable[[str], Plans], min_ready: int
) -> tuple[Worker, Plans] | None:
    """The serving worker that should be reloaded next, and its plans. None: no worker.

    A worker serves while it reloads, but it may fail. So `min_ready` others must serve, as far as there are
    that many.
    """
    serving = [worker for worker in workers if worker.is_serving]
    if len(serving) - 1 < min(min_ready, len(workers) - 1):
        return None
    for worker in serving:
        plans = wanted(worker.worker_id)
        if plans and not serves(worker, plans):
            return worker, plans
    return None
