"""Finding workers and watching them, as a gateway and a controller both do.

Workers are found by their leases in Redis. One telemetry stream per worker tells whether it lives and what it
serves. Redis only adds workers: a known one stays for as long as its telemetry comes, so a service goes on
with the workers it knows while Redis is down.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc
from redis.asyncio import Redis

from helios import channel, registry
from helios.ignored_entries import IgnoredEntries
from helios.redis_outage import reason
from helios.registry import WorkerLease
from helios.served import ServedPlan
from helios.v1 import worker_pb2, worker_pb2_grpc

_CHECKS_PER_TIMEOUT = 10


@dataclass(frozen=True, slots=True)
class WatchPace:
    """How often workers are looked for and how long they may be silent. All in seconds."""

    telemetry: float
    """Between two telemetry messages of a worker."""
    discovery: float
    """Between two looks at the leases."""
    redial: float
    """Before a worker whose telemetry has ended is dialled again."""
    timeout: float
    """A worker without telemetry for this long has stopped answering."""


class WatchedWorker:
    """One worker: its connection, what it told last, and for how long it has been silent.

    A service adds what it keeps of a worker in a subclass.
    """

    def __init__(
        self, lease: WorkerLease, timeout_seconds: float, options: Sequence[tuple[str, int]] = ()
    ) -> None:
        """`options` are gRPC channel options. Must be made in the event loop that uses it."""
        self.lease = lease
        self.channel = channel.to_service_async(lease.address, options)
        self.stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(self.channel)
        # All three are None until it has been reached.
        self.telemetry: worker_pb2.Telemetry | None = None
        self.status: worker_pb2.GetStatusResponse | None = None
        self.plan: ServedPlan | None = None
        # Counted by the watch while this process runs, not read off a clock.
        self.silent_seconds = 0.0
        self._timeout_seconds = timeout_seconds

    @property
    def address(self) -> str:
        """host:port."""
        return self.lease.address

    @property
    def is_silent(self) -> bool:
        """Whether it has stopped answering."""
        return self.silent_seconds > self._timeout_seconds

    async def take(self, message: worker_pb2.Telemetry) -> worker_pb2.Telemetry:
        """Takes in one telemetry message and asks for the status when the plan is another.

        Returns the telemetry that now holds: the status brings a newer one. Raises grpc.aio.AioRpcError when
        the worker does not give its status.
        """
        self.silent_seconds = 0.0
        is_new_plan = self.status is None or self.plan != _plan(message)
        if is_new_plan:
            request = worker_pb2.GetStatusRequest()
            self.status = await self.stub.GetStatus(request, timeout=self._timeout_seconds)
            message = self.status.telemetry
        self.telemetry, self.plan = message, _plan(message)
        self.heard(message)
        if is_new_plan:
            self.plan_changed()
        return message

    def heard(self, telemetry: worker_pb2.Telemetry) -> None:
        """For subclasses: called with each message."""

    def plan_changed(self) -> None:
        """For subclasses: called after `heard` with the first message under a plan."""


_Worker = TypeVar("_Worker", bound=WatchedWorker)


class WorkerWatch(Generic[_Worker]):
    """The workers that one service knows, each with a telemetry stream that is kept open."""

    def __init__(
        self,
        pace: WatchPace,
        make: Callable[[WorkerLease], _Worker],
        key: Callable[[WorkerLease], str],
        log: logging.Logger,
        *,
        on_heard: Callable[[_Worker, worker_pb2.Telemetry | None, worker_pb2.Telemetry], None],
        on_lost: Callable[[_Worker, str], None],
        on_silent: Callable[[_Worker], None] = lambda _: None,
        why_forget: Callable[[_Worker], str],
    ) -> None:
        """`key` tells workers apart: by their ids or by their addresses. `log` is the service's.

        on_heard: called with the telemetry before (None: it is the first) and the new one. on_lost: called
        whenever a telemetry stream has ended, with the reason. on_silent: called again and again while a
        worker is silent. why_forget: why a worker without a lease is to be forgotten; empty: it stays.
        """
        self._pace = pace
        self._make = make
        self._key = key
        self._log = log
        self._on_heard = on_heard
        self._on_lost = on_lost
        self._on_silent = on_silent
        self._why_forget = why_forget
        self._workers: dict[str, _Worker] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}
        # Keys of workers that stay without a lease.
        self._fixed: set[str] = set()
        # Why leases cannot be read; empty when they can.
        self._problem = ""
        self._is_cut_off = False
        self._ignored = IgnoredEntries(log)

    @property
    def workers(self) -> tuple[_Worker, ...]:
        """All known workers. Safe to ask for on another thread."""
        return tuple(self._workers.values())

    def find(self, key: str) -> _Worker | None:
        """The worker of this key."""
        return self._workers.get(key)

    def problems(self) -> list[str]:
        """Why workers cannot be found, in words."""
        return [*([self._problem] if self._problem else []), *self._ignored.problems()]

    def add_fixed(self, address: str) -> None:
        """Adds a worker that is known without a lease and is never forgotten."""
        lease = WorkerLease("", address)
        self._fixed.add(self._key(lease))
        self._add(lease)

    async def run(self, redis: Redis | None) -> None:
        """Looks for workers, and counts the silence of those it knows, until cancelled.

        `redis` is where leases are; None: only fixed workers are watched.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._count_silence())
            if redis is not None:
                tasks.create_task(self._discover(redis))

    async def close(self) -> None:
        """Ends all streams and connections; `run` has been cancelled before."""
        for stream in self._streams.values():
            stream.cancel()
        await asyncio.gather(*self._streams.values(), return_exceptions=True)
        await asyncio.gather(*(worker.channel.close() for worker in self.workers))

    async def _discover(self, redis: Redis) -> None:
        self._problem = "leases have not been read yet"
        while True:
            try:
                leases, ignored = await registry.leases(redis)
            # Whatever is wrong with Redis or in it, the service goes on with the workers it knows.
            except Exception as error:
                if not self._is_cut_off:
                    self._log.warning("discovery stands still: %s", reason(error))
                self._is_cut_off = True
                self._problem = (
                    f"cannot read worker leases from Redis, no new workers are found: {reason(error)}"
                )
            else:
                if self._is_cut_off:
                    self._log.info("Redis is back")
                self._is_cut_off, self._problem = False, ""
                self._ignored.update(ignored)
                await self._follow({self._key(lease): lease for lease in leases})
            await asyncio.sleep(self._pace.discovery)

    async def _follow(self, announced: Mapping[str, WorkerLease]) -> None:
        """Adds the workers that have a lease, and forgets those that have neither a lease nor a future."""
        for key, worker in tuple(self._workers.items()):
            lease = announced.get(key)
            if key in self._fixed:
                continue
            if lease is None:
                why = self._why_forget(worker)
            else:
                why = "" if lease.address == worker.address else f"it is at {lease.address} now"
            if why:
                self._log.info("worker %s at %s is gone: %s", worker.lease.worker_id, worker.address, why)
                await self._forget(key)
        for key, lease in announced.items():
            if key not in self._workers:
                self._add(lease)

    def _add(self, lease: WorkerLease) -> None:
        worker, key = self._make(lease), self._key(lease)
        self._workers[key] = worker
        self._streams[key] = asyncio.create_task(self._stream(worker))

    async def _forget(self, key: str) -> None:
        worker, stream = self._workers.pop(key), self._streams.pop(key)
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        await worker.channel.close()

    async def _stream(self, worker: _Worker) -> None:
        """Reads a worker's telemetry, and dials again whenever it ends."""
        request = worker_pb2.WatchTelemetryRequest(interval_seconds=self._pace.telemetry)
        while True:
            try:
                async for response in worker.stub.WatchTelemetry(request):
                    before = worker.telemetry
                    self._on_heard(worker, before, await worker.take(response.telemetry))
                why = "it ended its telemetry"
            except grpc.aio.AioRpcError as error:
                why = f"it cannot be reached: {error.code().name}, {error.details()}"
            self._on_lost(worker, why)
            await asyncio.sleep(self._pace.redial)

    async def _count_silence(self) -> None:
        """Adds up how long each worker has been silent. Telemetry sets the sum back to zero."""
        period = self._pace.timeout / _CHECKS_PER_TIMEOUT
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(period)
            now = time.monotonic()
            # If this process itself stood still, that is not the workers' silence.
            elapsed, checked_at = min(now - checked_at, 2 * period), now
            for worker in self.workers:
                worker.silent_seconds += elapsed
                if worker.is_silent:
                    self._on_silent(worker)


def _plan(telemetry: worker_pb2.Telemetry) -> ServedPlan | None:
    """What the worker serves; None when it does not say."""
    if not telemetry.model or not telemetry.depth:
        return None
    return ServedPlan(model=telemetry.model, depth=telemetry.depth)
