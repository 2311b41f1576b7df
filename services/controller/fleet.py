"""The workers as the controller sees them: found by their leases, watched by their telemetry."""

import asyncio
import logging
import time
from dataclasses import dataclass

import grpc
from redis.asyncio import Redis

from helios import channel, registry
from helios.ignored_entries import IgnoredEntries
from helios.redis_outage import reason
from helios.v1 import worker_pb2, worker_pb2_grpc
from services.controller.breach_window import BreachWindow
from services.controller.settings import ControllerSettings
from services.controller.situation import Plan, WorkerView
from services.controller.traffic_watch import Served

log = logging.getLogger(__name__)

_REDIAL_SECONDS = 0.5


@dataclass(slots=True)
class Totals:
    """What all workers have done since this controller watches them."""

    finished: int = 0
    prefilled: int = 0
    generated: int = 0
    high_exit: int = 0


class Worker:
    """One worker, from its telemetry and status."""

    def __init__(self, lease: registry.WorkerLease, settings: ControllerSettings) -> None:
        self.worker_id = lease.worker_id
        self.address = lease.address
        self.channel = channel.to_service_async(lease.address)
        self.stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self.window = BreachWindow(settings.window_tokens)
        self.telemetry: worker_pb2.Telemetry | None = None
        self.status: worker_pb2.GetStatusResponse | None = None
        self._timeout = settings.worker_timeout_seconds
        self._heard_at = time.monotonic()

    @property
    def plan(self) -> Plan | None:
        """What it serves; None until it has been heard."""
        return None if self.telemetry is None else _plan(self.telemetry)

    @property
    def is_silent(self) -> bool:
        """Whether it has stopped answering."""
        return time.monotonic() - self._heard_at > self._timeout

    @property
    def is_serving(self) -> bool:
        """Whether it answers and takes sequences."""
        known = self.telemetry is not None and self.status is not None
        return known and not self.is_silent and not (self.telemetry and self.telemetry.draining)

    @property
    def model(self) -> worker_pb2.ModelInfo:
        """The model of its plan. Raises ValueError until it has been heard."""
        return self._heard()[1].model

    @property
    def threads(self) -> int:
        """CPU threads of its engine. Raises ValueError until it has been heard."""
        return self._heard()[1].threads

    @property
    def memory_bytes(self) -> int:
        """Its budget for weights and KV. Raises ValueError until it has been heard."""
        return self._heard()[1].memory_bytes

    @property
    def precision(self) -> str:
        """What its products are computed in. Raises ValueError until it has been heard."""
        return self._heard()[1].precision

    @property
    def models(self) -> frozenset[str]:
        """Names of the models that it could load."""
        return frozenset(self.status.models) if self.status is not None else frozenset()

    async def take(self, message: worker_pb2.Telemetry) -> None:
        """Takes in one telemetry message; asks for the status when the plan is another."""
        self._heard_at = time.monotonic()
        is_new = self.plan != _plan(message) or self.status is None
        if is_new:
            self.status = await self.stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=self._timeout)
            message = self.status.telemetry
        self.telemetry = message
        self.window.add(message.generated_tokens, message.high_exit_tokens)
        if is_new:
            # Tokens that were generated before this message may be of the plan before.
            self.window.clear()

    def view(self, *, pinned: bool) -> WorkerView:
        """The policy's view of a worker that has been heard."""
        telemetry, status = self._heard()
        used = telemetry.blocks_total - telemetry.blocks_free
        return WorkerView(
            worker_id=self.worker_id,
            model=telemetry.model,
            depth=telemetry.depth,
            tokenizer_id=status.model.tokenizer_id,
            pinned=pinned,
            running=telemetry.running,
            waiting=telemetry.waiting,
            tokens_in_flight=used * status.block_tokens,
            window_tokens=self.window.tokens,
            window_high_exit_tokens=self.window.high_exit_tokens,
            threshold=status.model.threshold if status.model.HasField("threshold") else None,
            max_running=status.max_running,
            memory_bytes=status.memory_bytes,
        )

    def _heard(self) -> tuple[worker_pb2.Telemetry, worker_pb2.GetStatusResponse]:
        if self.telemetry is None or self.status is None:
            raise ValueError(f"worker {self.worker_id} has not been heard yet")
        return self.telemetry, self.status


class Fleet:
    """All workers with a lease."""

    def __init__(self, redis: Redis, settings: ControllerSettings) -> None:
        self._redis = redis
        self._settings = settings
        self._workers: dict[str, Worker] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self.totals = Totals()
        # What was served since it was asked last, by plan.
        self._served: dict[Plan, Served] = {}
        # Set whenever a worker was heard.
        self.news = asyncio.Event()
        # Why workers cannot be found; empty when they can.
        self._problem = "leases have not been read yet"
        self._is_cut_off = False
        self._ignored = IgnoredEntries(log)

    def problems(self) -> list[str]:
        """Why workers cannot be found, in words."""
        return [*([self._problem] if self._problem else []), *self._ignored.problems()]

    @property
    def workers(self) -> list[Worker]:
        """All known workers, in the order of their ids."""
        # Copied in one step: metrics are read on a thread of their own.
        return sorted(self._workers.values(), key=lambda worker: worker.worker_id)

    @property
    def serving(self) -> list[Worker]:
        """Those that answer and take sequences."""
        return [worker for worker in self.workers if worker.is_serving]

    @property
    def threads(self) -> int:
        """CPU threads of all that serve."""
        return sum(worker.threads for worker in self.serving)

    @property
    def is_settled(self) -> bool:
        """Whether leases have been read, some worker serves and each has answered or gone silent."""
        return bool(self.serving) and all(
            worker.status is not None or worker.is_silent for worker in self.workers
        )

    def find(self, worker_id: str) -> Worker | None:
        """The worker of this id."""
        return self._workers.get(worker_id)

    async def run(self) -> None:
        """Looks for workers until cancelled. Without Redis those that are known stay."""
        while True:
            try:
                leases, ignored = await registry.leases(self._redis)
            # Whatever is wrong with Redis or in it, the known workers keep their plan.
            except Exception as error:
                if not self._is_cut_off:
                    log.warning("discovery stands still: %s", reason(error))
                self._is_cut_off = True
                self._problem = f"cannot read worker leases from Redis: {reason(error)}"
            else:
                self._is_cut_off, self._problem = False, ""
                self._ignored.update(ignored)
                await self._update({lease.worker_id: lease for lease in leases})
            await asyncio.sleep(self._settings.discovery_seconds)

    async def close(self) -> None:
        """Ends all watches and connections."""
        for worker_id in tuple(self._workers):
            await self._remove(worker_id)

    async def _update(self, leases: dict[str, registry.WorkerLease]) -> None:
        for worker_id, worker in tuple(self._workers.items()):
            lease = leases.get(worker_id)
            moved = lease is not None and lease.address != worker.address
            if moved or (lease is None and worker.is_silent):
                await self._remove(worker_id)
        for worker_id, lease in leases.items():
            if worker_id not in self._workers:
                log.info("worker %s at %s is found", worker_id, lease.address)
                worker = self._workers[worker_id] = Worker(lease, self._settings)
                self._watches[worker_id] = asyncio.create_task(self._watch(worker))

    async def _remove(self, worker_id: str) -> None:
        worker, watch = self._workers.pop(worker_id), self._watches.pop(worker_id)
        log.info("worker %s at %s is gone", worker_id, worker.address)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await worker.channel.close()

    async def _watch(self, worker: Worker) -> None:
        """Reads a worker's telemetry, and dials again whenever it ends."""
        request = worker_pb2.WatchTelemetryRequest(interval_seconds=self._settings.telemetry_seconds)
        is_lost = False
        while True:
            try:
                async for response in worker.stub.WatchTelemetry(request):
                    before, is_lost = worker.telemetry, False
                    await worker.take(response.telemetry)
                    if before is not None and worker.telemetry is not None:
                        self._count(before, worker.telemetry)
                    self.news.set()
            except grpc.aio.AioRpcError as error:
                if not is_lost:
                    log.warning("worker %s: telemetry ended: %s", worker.worker_id, error.details())
                is_lost = True
            await asyncio.sleep(_REDIAL_SECONDS)

    def _count(self, before: worker_pb2.Telemetry, now: worker_pb2.Telemetry) -> None:
        if now.generated_tokens < before.generated_tokens:
            return  # Another process under the same name, which begins at zero.
        self.totals.finished += now.finished_sequences - before.finished_sequences
        self.totals.prefilled += now.prefill_tokens - before.prefill_tokens
        self.totals.generated += now.generated_tokens - before.generated_tokens
        self.totals.high_exit += now.high_exit_tokens - before.high_exit_tokens
        plan = _plan(now)
        if plan != _plan(before):
            return  # What was served in between is of both.
        served = Served(
            plan,
            now.finished_sequences - before.finished_sequences,
            now.confidence_tokens - before.confidence_tokens,
            now.confidence_nats - before.confidence_nats,
            now.prompts_read - before.prompts_read,
            now.prompt_tokens_read - before.prompt_tokens_read,
            now.prompt_nats - before.prompt_nats,
        )
        self._served[plan] = served if plan not in self._served else self._served[plan].plus(served)

    def take_served(self) -> list[Served]:
        """What was served since the last call, by plan."""
        served, self._served = self._served, {}
        return list(served.values())


def _plan(telemetry: worker_pb2.Telemetry) -> Plan:
    return Plan(model=telemetry.model, depth=telemetry.depth)
