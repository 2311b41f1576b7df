"""Reloads one worker: requests it, follows its stages, and gives up when the worker is lost."""

import asyncio
import logging
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
    plan: ServedPlan,
    timeout_seconds: float,
    threshold: float | None = None,
    *,
    urgent: bool = False,
    loaded: asyncio.Event | None = None,
) -> Reloaded:
    """Reloads one worker. Returns when its telemetry shows the plan.

    `threshold`: confidence below which the worker counts a token as unsure; None: its own. `urgent`: loading
    does not yield to serving. `loaded` is set when new sequences get the plan.

    Raises WorkerLostError when the worker stops answering, or else the worker's own refusal. After a refusal
    it continues to serve its old plan.
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
