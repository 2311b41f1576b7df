"""Bringing workers to their plans: one after the other, halting at the first that does not come along."""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from helios.client import error_from
from helios.errors import HeliosError, UnavailableError
from helios.served import ServedPlan
from helios.v1 import worker_pb2
from services.controller.fleet import Worker

log = logging.getLogger(__name__)

_CHECK_SECONDS = 0.1
# Statuses that tell of the worker or the way to it, not of what was asked.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class WorkerLostError(UnavailableError):
    """The worker stopped answering during its reload."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did, as the worker reports it."""

    seconds: float
    stall_seconds: float
    sequences_moved: int


async def reload(
    worker: Worker,
    plan: ServedPlan,
    timeout_seconds: float,
    threshold: float | None = None,
    *,
    urgent: bool = False,
    loaded: asyncio.Event | None = None,
) -> Reloaded:
    """Reloads one worker; returns once its telemetry shows the plan.

    `threshold` is the confidence below which it counts a token as unsure; None: its own. `urgent`: loading
    does not stand back behind serving. `loaded` is set when the plan takes in new sequences.

    Raises WorkerLostError when it stops answering, else the worker's own refusal: its old plan serves then.
    """
    loaded = loaded or asyncio.Event()
    reading = asyncio.create_task(
        _read_stages(worker, plan, timeout_seconds, threshold, urgent=urgent, loaded=loaded)
    )
    try:
        while not reading.done():
            await asyncio.wait({reading}, timeout=_CHECK_SECONDS)
            if worker.is_silent:
                raise WorkerLostError(f"{worker.worker_id} stopped answering while it loaded {plan}")
        done = reading.result()
    except grpc.aio.AioRpcError as error:
        if error.code() in _LOST:
            raise WorkerLostError(f"{worker.worker_id} was lost: {error.details()}") from error
        raise error_from(error, worker.address) from error
    finally:
        reading.cancel()
    while worker.plan != plan:
        if worker.is_silent:
            raise WorkerLostError(f"{worker.worker_id} stopped answering after it had loaded {plan}")
        await asyncio.sleep(_CHECK_SECONDS)
    log.info("%s serves %s after %.2f s", worker.worker_id, plan, done.seconds)
    return Reloaded(done.seconds, done.stall_seconds, done.sequences_moved)


async def _read_stages(
    worker: Worker,
    plan: ServedPlan,
    timeout_seconds: float,
    threshold: float | None,
    *,
    urgent: bool,
    loaded: asyncio.Event,
) -> worker_pb2.ReloadResponse:
    request = worker_pb2.ReloadRequest(model=plan.model, depth=plan.depth, threshold=threshold, urgent=urgent)
    last = worker_pb2.ReloadResponse()
    async for last in worker.stub.Reload(request, timeout=timeout_seconds):
        if last.stage == worker_pb2.RELOAD_STAGE_SWAPPING:
            loaded.set()
    if last.stage != worker_pb2.RELOAD_STAGE_DONE:
        raise WorkerLostError(f"{worker.worker_id} ended its reload without a result")
    return last


async def move_overlapping(
    following: Callable[[Collection[str]], tuple[Worker, ServedPlan] | None],
    move: Callable[[Worker, ServedPlan, asyncio.Event], Coroutine[Any, Any, bool]],
) -> bool:
    """Moves all workers that are to move. The next begins once the one before has loaded its plan, which is
    what may fail, while sequences in flight still move to it.

    following: who is next, besides these. move: returns whether the worker came along, and sets the event
    when it has loaded. Returns whether workers moved, and none failed.
    """
    moves: dict[str, asyncio.Task[bool]] = {}
    async with asyncio.TaskGroup() as group:
        while (found := following(moves)) is not None:
            worker, plan = found
            loaded = asyncio.Event()
            moves[worker.worker_id] = moving = group.create_task(move(worker, plan, loaded))
            waiting = group.create_task(loaded.wait())
            await asyncio.wait({moving, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if any(one.done() and not one.result() for one in moves.values()):
                break
    return bool(moves) and all(one.result() for one in moves.values())


def next_to_move(
    workers: Sequence[Worker], wanted: Callable[[str], ServedPlan | None], min_ready: int
) -> tuple[Worker, ServedPlan] | None:
    """The serving worker that should be reloaded next, and to which plan; or None.

    A worker serves while it reloads, but it may fail: `min_ready` others must serve, as far as there are any.
    """
    serving = [worker for worker in workers if worker.is_serving]
    if len(serving) - 1 < min(min_ready, len(workers) - 1):
        return None
    for worker in serving:
        plan = wanted(worker.worker_id)
        if plan is not None and worker.plan != plan:
            return worker, plan
    return None


@dataclass(slots=True)
class Rollout:
    """How far the last plan has got."""

    # Whether what is served meanwhile is probably out of its bounds.
    urgent: bool = False
    reload_seconds: float = 0.0
    stall_seconds: float = 0.0
    sequences_moved: int = 0
    # Where and why it halted; empty while it goes on. `lost` is the worker whose return lets it go on.
    halted: str = ""
    lost: str = ""

    def add(self, moved: Reloaded) -> None:
        """Counts one worker's reload."""
        self.reload_seconds += moved.seconds
        self.stall_seconds = max(self.stall_seconds, moved.stall_seconds)
        self.sequences_moved += moved.sequences_moved

    def halt(self, worker: Worker, plan: ServedPlan, error: HeliosError) -> None:
        """Stops here, saying why."""
        self.halted = f"the rollout of {plan} halted at {worker.worker_id}: {error.message}"
        self.lost = worker.worker_id if isinstance(error, WorkerLostError) else ""
        log.warning("%s", self.halted)
