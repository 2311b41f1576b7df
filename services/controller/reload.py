"""Reloads one worker: requests it, follows its stages, and gives up when the worker is lost."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc

from helios.client import error_from
from helios.errors import UnavailableError
from helios.served import ServedPlan
from helios.v1 import worker_pb2
from services.controller.fleet import Worker

log = logging.getLogger(__name__)

_CHECK_SECONDS = 0.1
# Statuses that concern the worker or the connection to it, not the request.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class WorkerLostError(UnavailableError):
    """The worker stopped answering during its reload."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload took, as reported by the worker."""

    seconds: float
    stall_seconds: float
    sequences_moved: int


async def reload(
    worker: Worker,
    plans: Sequence[ServedPlan],
    timeout_seconds: float,
    thresholds: Mapping[ServedPlan, float],
    *,
    urgent: bool = False,
    loaded: asyncio.Event | None = None,
) -> Reloaded:
    """Reloads one worker. Returns when its telemetry shows the plans, the first of them first.

    `thresholds`: by plan, the confidence below which the worker counts a token as unsure; where there is
    none, its own. `urgent`: loading does not yield to serving. `loaded` is set when new sequences get the
    plans.

    Raises WorkerLostError when the worker stops answering, or else the worker's own refusal. After a refusal
    it continues to serve its old plans.
    """
    names = named(plans)
    loaded = loaded or asyncio.Event()
    reading = asyncio.create_task(
        _read_stages(worker, plans, timeout_seconds, thresholds, urgent=urgent, loaded=loaded)
    )
    try:
        while not reading.done():
            await asyncio.wait({reading}, timeout=_CHECK_SECONDS)
            if worker.is_silent:
                raise WorkerLostError(f"{worker.worker_id} stopped answering while it loaded {names}")
        done = reading.result()
    except grpc.aio.AioRpcError as error:
        if error.code() in _LOST:
            raise WorkerLostError(f"{worker.worker_id} was lost: {error.details()}") from error
        raise error_from(error, worker.address) from error
    finally:
        reading.cancel()
    while not serves(worker, plans):
        if worker.is_silent:
            raise WorkerLostError(f"{worker.worker_id} stopped answering after it had loaded {names}")
        await asyncio.sleep(_CHECK_SECONDS)
    log.info("%s serves %s after %.2f s", worker.worker_id, names, done.seconds)
    return Reloaded(done.seconds, done.stall_seconds, done.sequences_moved)


def serves(worker: Worker, plans: Sequence[ServedPlan]) -> bool:
    """Whether a worker serves exactly these plans, the first of them first."""
    return worker.plan == plans[0] and set(worker.plans) == set(plans)


def named(plans: Sequence[ServedPlan]) -> str:
    """Plans in words, the depths of a model together."""
    depths: dict[str, list[int]] = {}
    for plan in plans:
        depths.setdefault(plan.model, []).append(plan.depth)
    return ", ".join(
        f"{model} at depth{'s' if len(found) > 1 else ''} {', '.join(map(str, sorted(found)))}"
        for model, found in depths.items()
    )


async def _read_stages(
    worker: Worker,
    plans: Sequence[ServedPlan],
    timeout_seconds: float,
    thresholds: Mapping[ServedPlan, float],
    *,
    urgent: bool,
    loaded: asyncio.Event,
) -> worker_pb2.ReloadResponse:
    first, *others = plans
    request = worker_pb2.ReloadRequest(
        model=first.model,
        depth=first.depth,
        threshold=thresholds.get(first),
        urgent=urgent,
        also=[
            worker_pb2.PlanToLoad(model=one.model, depth=one.depth, threshold=thresholds.get(one))
            for one in others
        ],
    )
    last = worker_pb2.ReloadResponse()
    async for last in worker.stub.Reload(request, timeout=timeout_seconds):
        if last.stage == worker_pb2.RELOAD_STAGE_SWAPPING:
            loaded.set()
    if last.stage != worker_pb2.RELOAD_STAGE_DONE:
        raise WorkerLostError(f"{worker.worker_id} ended its reload without a result")
    return last
