"""Finds workers and watches them, for the gateway and the controller.

Workers are found by their leases in Redis. One telemetry stream per worker shows whether it is alive and what
it serves. Redis only adds workers. A known worker stays for as long as its telemetry comes, so a service
continues with its known workers while Redis is down.
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
    """How often workers are looked for, and how long they may be silent. All in seconds."""

    telemetry: float
    """Interval between two telemetry messages of a worker."""
    discovery: float
    """Interval between two reads of the leases."""
    redial: float
    """Delay before reconnecting to a worker whose telemetry has ended."""
    timeout: float
    """After this long without telemetry, a worker counts as silent."""


class WatchedWorker:
    """One worker: its connection, its last messages, and the length of its silence.

    A service adds its own data about a worker in a subclass.
    """

    def __init__(
        self, lease: WorkerLease, timeout_seconds: float, options: Sequence[tuple[str, int]] = ()
    ) -> None:
        """`options` are gRPC channel options. Create it in the event loop that uses it."""
        self.lease = lease
        self.channel = channel.to_service_async(lease.address, options)
        self.stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(self.channel)
        # All are None or empty until the worker has been reached.
        self.telemetry: worker_pb2.Telemetry | None = None
        self.status: worker_pb2.GetStatusResponse | None = None
        # The plans in force, the first one first.
        self.plans: tuple[ServedPlan, ...] = ()
        # Counted by the watch while this process runs, not computed from a clock.
        self.silent_seconds = 0.0
        self._timeout_seconds = timeout_seconds

    @property
    def address(self) -> str:
        """host:port."""
        return self.lease.address

    @property
    def plan(self) -> ServedPlan | None:
        """The first of its plans. None until it has been reached."""
        return self.plans[0] if self.plans else None

    @property
    def is_silent(self) -> bool:
        """Whether it has stopped answering."""
        return self.silent_seconds > self._timeout_seconds

    async def take(self, message: worker_pb2.Telemetry) -> worker_pb2.Telemetry:
        """Handles one telemetry message. Requests the status when the plans have changed.

        Returns the telemetry that is valid now, because the status brings a newer one. Raises
        grpc.aio.AioRpcError when the worker does not return its status.
        """
        self.silent_seconds = 0.0
        is_new_plan = self.status is None or self.plans != _plans(message)
        if is_new_plan:
            request = worker_pb2.GetStatusRequest()
            self.status = await self.stub.GetStatus(request, timeout=self._timeout_seconds)
            message = self.status.telemetry
        self.telemetry, self.plans = message, _plans(message)
        self.heard(message)
        if is_new_plan:
            self.plan_changed()
        return message

    def heard(self, telemetry: worker_pb2.Telemetry) -> None:
        """For subclasses: called with each telemetry message."""

    def plan_changed(self) -> None:
        """For subclasses: called after `heard` with the first message under new plans."""


_Worker = TypeVar("_Worker", bound=WatchedWorker)


class WorkerWatch(Generic[_Worker]):
    """The workers that one service knows. Each has a telemetry stream that is kept open."""

    def __init__(
        self,
        pace: WatchPace,
        make: Callable[[WorkerLease], _Worker],
        key: Callable[[WorkerLease], str],
        log: logging.Logger,
        *,
        on_heard: Callable[[_Worker, worker_pb2.Telemetry | None, worker_pb2.Telemetry], None],
        on_lost: Callable[[_Worker, str], None],
        on_served: Callable[[Sequence[worker_pb2.ServedPrompt]], None] | None = None,
        on_silent: Callable[[_Worker], None] = lambda _: None,
        why_forget: Callable[[_Worker], str],
    ) -> None:
        """`key` identifies workers, by their ids or by their addresses. `log` is the service's logger.

        on_heard: called with the previous telemetry (None: there was none) and the new one. on_lost: called
        whenever a telemetry stream has ended, with the reason. on_served: called with the prompts that were
        routed and computed, the newest last; None: workers do not send them. on_silent: called repeatedly
        while a worker is silent. why_forget: why a worker without a lease should be forgotten; empty: it
        stays.
        """
        self._pace = pace
        self._make = make
        self._key = key
        self._log = log
        self._on_heard = on_heard
        self._on_lost = on_lost
        self._on_served = on_served
        self._on_silent = on_silent
        self._why_forget = why_forget
        self._workers: dict[str, _Worker] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}
        # Keys of workers that stay without a lease.
        self._fixed: set[str] = set()
        # Why leases cannot be read. Empty if they can.
        self._problem = ""
        self._is_cut_off = False
        self._ignored = IgnoredEntries(log)

    @property
    def workers(self) -> tuple[_Worker, ...]:
        """All known workers. Safe to call on another thread."""
        return tuple(self._workers.values())

    def find(self, key: str) -> _Worker | None:
        """The worker with this key."""
        return self._workers.get(key)

    def problems(self) -> list[str]:
        """Messages that say why workers cannot be found."""
        return [*([self._problem] if self._problem else []), *self._ignored.problems()]

    def add_fixed(self, address: str) -> None:
        """Adds a worker without a lease. It is never forgotten."""
        lease = WorkerLease("", address)
        self._fixed.add(self._key(lease))
        self._add(lease)

    async def run(self, redis: Redis | None) -> None:
        """Looks for workers and counts the silence of the known ones, until cancelled.

        `redis` holds the leases. None: only fixed workers are watched.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._count_silence())
            if redis is not None:
                tasks.create_task(self._discover(redis))

    async def close(self) -> None:
        """Ends all streams and connections. Cancel `run` first."""
        for stream in self._streams.values():
            stream.cancel()
        await asyncio.gather(*self._streams.values(), return_exceptions=True)
        await asyncio.gather(*(worker.channel.close() for worker in self.workers))

    async def _discover(self, redis: Redis) -> None:
        self._problem = "leases have not been read yet"
        while True:
            try:
                leases, ignored = await registry.leases(redis)
            # Whatever is wrong with Redis or its contents, the service continues with the known workers.
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
        """Adds workers with a new lease. Forgets those at another address now, or if `why_forget` says so."""
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
        """Reads a worker's telemetry. Reconnects whenever it ends."""
        request = worker_pb2.WatchTelemetryRequest(
            interval_seconds=self._pace.telemetry, served_prompts=self._on_served is not None
        )
        while True:
            try:
                async for response in worker.stub.WatchTelemetry(request):
                    before = worker.telemetry
                    self._on_heard(worker, before, await worker.take(response.telemetry))
                    if self._on_served is not None and response.served_prompts:
                        self._on_served(response.served_prompts)
                why = "it ended its telemetry"
            except grpc.aio.AioRpcError as error:
                why = f"it cannot be reached: {error.code().name}, {error.details()}"
            self._on_lost(worker, why)
            await asyncio.sleep(self._pace.redial)

    async def _count_silence(self) -> None:
        """Adds up how long each worker has been silent. Telemetry resets the sum to zero."""
        period = self._pace.timeout / _CHECKS_PER_TIMEOUT
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(period)
            now = time.monotonic()
            # A pause of this process itself does not count as silence of the workers.
            elapsed, checked_at = min(now - checked_at, 2 * period), now
            for worker in self.workers:
                worker.silent_seconds += elapsed
                if worker.is_silent:
                    self._on_silent(worker)


def _plans(telemetry: worker_pb2.Telemetry) -> tuple[ServedPlan, ...]:
    """The plans that the worker serves. Empty when it does not report one."""
    listed = [(one.plan.model, one.plan.depth) for one in telemetry.plans]
    # A worker that serves only one plan need not list it.
    plans = listed or [(telemetry.model, telemetry.depth)]
    return tuple(ServedPlan(model=model, depth=depth) for model, depth in plans if model and depth)
