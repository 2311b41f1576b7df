"""The workers this gateway knows: found by their leases in Redis or named in its settings.

One telemetry stream per worker tells whether it lives and how loaded it is. Redis only adds workers: a
known one stays for as long as its telemetry comes, so streams go on while Redis is down.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager

import grpc
from redis.asyncio import Redis

from helios import channel, redis_client, registry
from helios.errors import UnavailableError, UnknownModelError
from helios.ignored_entries import IgnoredEntries
from helios.redis_outage import reason
from helios.served import ServedPlan
from helios.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from services.gateway.router import Candidate, Needs, choose
from services.gateway.settings import GatewaySettings
from services.gateway.worker_call import Attempt, Take, WorkerCall

log = logging.getLogger(__name__)

_WORKER_OPTIONS = (
    # Tokenizers of large vocabularies exceed gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
)
_CHECKS_PER_TIMEOUT = 10
# A status travels in HTTP/2 trailers, which hold about 8 KiB.
_WORKERS_TOLD = 5


class Worker:
    """One worker as this gateway knows it."""

    def __init__(self, address: str, overdue_seconds: float, on_acquitted: Callable[[], None]) -> None:
        """Silent for `overdue_seconds`, it may be dead. `on_acquitted`: as in WorkerCall."""
        self.address = address
        self._overdue_seconds = overdue_seconds
        self._on_acquitted = on_acquitted
        self.channel = channel.to_service_async(address, _WORKER_OPTIONS)
        self.stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(self.channel)
        # Both are empty until it has been reached.
        self.telemetry = worker_pb2.Telemetry()
        self.model = worker_pb2.ModelInfo()
        # Seconds without telemetry, as counted by the pool's checks.
        self.silent_seconds = 0.0
        # Why it takes no streams; empty when it does.
        self.problem = "it has not been reached yet"
        # Of this gateway.
        self.open_streams = 0
        # Sequences that the last telemetry counted beside this gateway's own.
        self._foreign_sequences = 0
        self._call: WorkerCall | None = None

    @property
    def ready(self) -> bool:
        """Whether it takes streams."""
        return not self.problem

    @property
    def worker_id(self) -> str:
        """Its own name for itself; empty until it has been reached."""
        return self.telemetry.worker_id

    @property
    def plan(self) -> ServedPlan | None:
        """What it served when last heard of; None until it has been reached."""
        return ServedPlan(model=self.model.name, depth=self.model.depth) if self.model.name else None

    @property
    def suspects(self) -> int:
        """Streams here under which another worker has failed and which have not settled."""
        return 0 if self._call is None else self._call.suspects

    @contextmanager
    def attempt(
        self,
        request: worker_pb2.WorkerServiceGenerateRequest,
        timeout_seconds: float,
        take: Take,
        *,
        suspect: bool,
    ) -> Iterator[Attempt]:
        """A stream that is counted as this worker's load, and ended there if it outlives the block.

        `take` gets its tokens; `suspect`: a worker has failed under it.
        """
        if self._call is None or self._call.ended:
            self._call = WorkerCall(self.stub, self.address, self._on_acquitted)
        call = self._call
        # A worker that has died a moment ago, unnoticed, does not fail because of what it is sent now.
        reached = (
            self.channel.get_state() is grpc.ChannelConnectivity.READY
            and self.silent_seconds < self._overdue_seconds
        )
        attempt = call.start(request, timeout_seconds, take, suspect=suspect, reached=reached)
        self.open_streams += 1
        try:
            yield attempt
        finally:
            self.open_streams -= 1
            call.forget(attempt)

    def give_up_streams(self) -> None:
        """Ends all its streams, because it is lost; they read WorkerFailedError."""
        if self._call is not None:
            self._call.close(self.problem)
            self._call = None

    def heard(self, message: worker_pb2.Telemetry) -> None:
        """Takes in one telemetry message."""
        self.telemetry = message
        self._foreign_sequences = max(0, message.running + message.waiting - self.open_streams)

    def candidate(self) -> Candidate | None:
        """The router's view of it; None while it is not ready."""
        plan = self.plan
        if self.problem or plan is None:
            return None
        return Candidate(
            address=self.address,
            plan=plan,
            tokenizer_id=self.model.tokenizer_id,
            context_tokens=self.model.context_tokens,
            sequences=self.open_streams + self._foreign_sequences,
            free_share=self.telemetry.blocks_free / max(1, self.telemetry.blocks_total),
            suspects=self.suspects,
        )

    def state(self) -> inference_pb2.WorkerState:
        """What GetServingStatus tells of it."""
        return inference_pb2.WorkerState(
            worker_id=self.worker_id,
            address=self.address,
            ready=self.ready,
            reason=self.problem,
            telemetry=self.telemetry if self.worker_id else None,
            open_streams=self.open_streams,
        )


class WorkerPool:
    """Finds workers, watches them, and hands out the best one for a stream."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._workers: dict[str, Worker] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._redis: Redis | None = None
        self._redis_problem = ""
        self._ignored = IgnoredEntries(log)

    def start(self) -> None:
        """Begins to look for workers and to watch them."""
        for address in self._settings.worker_addresses:
            self._add(address)
        self._tasks.append(asyncio.create_task(self._check_liveness()))
        if self._settings.redis_url:
            timeout = self._settings.worker_timeout_seconds
            self._redis = redis_client.connect(self._settings.redis_url, timeout)
            self._tasks.append(asyncio.create_task(self._discover(self._redis)))

    async def close(self) -> None:
        """Stops watching and closes all connections."""
        tasks = [*self._tasks, *self._watches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.channel.close() for worker in self._workers.values()))
        if self._redis is not None:
            await self._redis.aclose()

    @property
    def workers(self) -> Sequence[Worker]:
        """All known workers, ready or not."""
        return tuple(self._workers.values())

    def problems(self) -> list[str]:
        """What cannot be reached at the moment, in words."""
        found = [self._redis_problem] if self._redis_problem else []
        found += self._ignored.problems()
        if not any(worker.ready for worker in self._workers.values()):
            found.append(f"no worker is ready: {self._waited_for()}")
        return found

    def choose(
        self,
        needs: Needs,
        *,
        prefer: ServedPlan | None = None,
        avoid: Set[str] = frozenset(),
        exclude: Set[str] = frozenset(),
        alone: bool = False,
    ) -> Worker | None:
        """The ready worker that should take a stream (router.choose), or None."""
        chosen = choose(self._candidates(), needs, prefer=prefer, avoid=avoid, exclude=exclude, alone=alone)
        return self._workers[chosen.address] if chosen is not None else None

    def context_tokens(self, needs: Needs) -> int:
        """The longest context among the ready workers that meet the needs; 0 without any."""
        return max((one.context_tokens for one in self._candidates() if needs.met_by(one)), default=0)

    async def wait_for(
        self,
        needs: Needs,
        *,
        prefer: ServedPlan | None = None,
        avoid: Set[str] = frozenset(),
        alone: bool = False,
        under_way: bool = False,
    ) -> Worker:
        """Like `choose`, but waits `worker_wait_seconds` for a worker.

        Raises UnavailableError, saying what was waited for, when none came, and UnknownModelError at
        once when workers are ready and none of those known serves the model, unless the stream is under
        way: then its model has been served and may come back.
        """
        seconds = self._settings.worker_wait_seconds
        try:
            async with asyncio.timeout(seconds):
                while (worker := self.choose(needs, prefer=prefer, avoid=avoid, alone=alone)) is None:
                    if not under_way:
                        self._check_model_is_served(needs)
                    await self._changed.wait()
        except TimeoutError:
            what = " or ".join(sorted(needs.models)) or "any model"
            raise UnavailableError(
                f"waited {seconds:g} s for a worker that serves {what}: {self._waited_for()}"
            ) from None
        return worker

    async def changed(self) -> None:
        """Waits for the next news of any worker or of the streams on it, at the latest its next telemetry."""
        await self._changed.wait()

    def suspect(self, worker: Worker, problem: str) -> None:
        """Takes a worker out until its next telemetry, because a stream found that it does not serve."""
        self._set_problem(worker, problem)

    def _candidates(self) -> Iterator[Candidate]:
        for worker in self._workers.values():
            candidate = worker.candidate()
            if candidate is not None:
                yield candidate

    def _check_model_is_served(self, needs: Needs) -> None:
        served = {worker.model.name for worker in self._workers.values()}
        ready = any(worker.ready for worker in self._workers.values())
        # A worker that has not been reached yet may serve it.
        if needs.models and ready and "" not in served and not needs.models & served:
            asked = " or ".join(sorted(needs.models))
            raise UnknownModelError(f"model {asked} is not served; served are {', '.join(sorted(served))}")

    def _waited_for(self) -> str:
        if not self._workers:
            if self._redis_problem:
                return self._redis_problem
            if ignored := self._ignored.problems():
                return "; ".join(ignored)
            if self._settings.redis_url:
                return "no worker has announced itself in Redis; start one"
            return "this gateway has neither a Redis URL nor a list of workers; set one"
        found = [
            f"{worker.worker_id or 'worker'} at {worker.address}: {worker.problem or f'serves {worker.plan}'}"
            for worker in self._workers.values()
        ]
        more = len(found) - _WORKERS_TOLD
        return "; ".join(found[:_WORKERS_TOLD] + ([f"and {more} more"] if more > 0 else []))

    def _add(self, address: str) -> None:
        settings = self._settings
        overdue_seconds = (settings.telemetry_seconds + settings.worker_timeout_seconds) / 2
        worker = Worker(address, overdue_seconds, self._wake)
        self._workers[address] = worker
        self._watches[address] = asyncio.create_task(self._watch(worker))

    async def _remove(self, worker: Worker) -> None:
        log.info("worker %s at %s is gone: %s", worker.worker_id, worker.address, worker.problem)
        del self._workers[worker.address]
        watch = self._watches.pop(worker.address)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await worker.channel.close()

    async def _discover(self, redis: Redis) -> None:
        """Adds workers with a lease; removes those that have neither a lease nor telemetry."""
        while True:
            try:
                leases, ignored = await registry.leases(redis)
            # Whatever is wrong with Redis or in it, the data plane goes on with the workers it knows.
            except Exception as error:
                if not self._redis_problem:
                    log.warning("discovery stands still: %s", reason(error))
                self._redis_problem = (
                    f"cannot read worker leases from Redis, no new workers are found: {reason(error)}"
                )
            else:
                if self._redis_problem:
                    log.info("Redis is back")
                self._redis_problem = ""
                self._ignored.update(ignored)
                announced = {lease.address for lease in leases}
                for address in announced - self._workers.keys():
                    self._add(address)
                for address in self._workers.keys() - announced - set(self._settings.worker_addresses):
                    worker = self._workers[address]
                    if not worker.ready and not worker.open_streams:
                        await self._remove(worker)
            await asyncio.sleep(self._settings.discovery_seconds)

    async def _watch(self, worker: Worker) -> None:
        """Reads a worker's telemetry, and dials again whenever it ends."""
        request = worker_pb2.WatchTelemetryRequest(interval_seconds=self._settings.telemetry_seconds)
        while True:
            try:
                async for response in worker.stub.WatchTelemetry(request):
                    await self._take(worker, response.telemetry)
                problem = "it ended its telemetry"
            except grpc.aio.AioRpcError as error:
                problem = f"it cannot be reached: {error.code().name}, {error.details()}"
            self._set_problem(worker, problem)
            await asyncio.sleep(self._settings.redial_seconds)

    async def _take(self, worker: Worker, message: worker_pb2.Telemetry) -> None:
        worker.silent_seconds = 0
        if worker.plan != ServedPlan(model=message.model, depth=message.depth):
            status = await worker.stub.GetStatus(
                worker_pb2.GetStatusRequest(), timeout=self._settings.worker_timeout_seconds
            )
            worker.model = status.model
            message = status.telemetry
        worker.heard(message)
        sequences = message.running + message.waiting
        if sequences and message.step_age_seconds > self._settings.engine_timeout_seconds:
            stuck = f"no step for {message.step_age_seconds:.1f} s with {sequences} sequences"
            self._set_problem(worker, f"its engine hangs: {stuck}")
            worker.give_up_streams()
        else:
            self._set_problem(worker, "it is draining" if message.draining else "")

    async def _check_liveness(self) -> None:
        """Gives up workers that have fallen silent, and frees their streams."""
        timeout = self._settings.worker_timeout_seconds
        period = timeout / _CHECKS_PER_TIMEOUT
        checked_at = time.monotonic()
        while True:
            await asyncio.sleep(period)
            now = time.monotonic()
            # If this process itself stood still, that is not the workers' silence.
            elapsed, checked_at = min(now - checked_at, 2 * period), now
            for worker in self._workers.values():
                worker.silent_seconds += elapsed
                if worker.silent_seconds > timeout:
                    if worker.ready:
                        self._set_problem(worker, f"it has sent no telemetry for {timeout:g} s")
                    worker.give_up_streams()

    def _set_problem(self, worker: Worker, problem: str) -> None:
        if problem != worker.problem:
            if problem:
                log.warning("worker %s at %s takes no streams: %s", worker.worker_id, worker.address, problem)
            else:
                log.info("worker %s at %s is ready: serves %s", worker.worker_id, worker.address, worker.plan)
        worker.problem = problem
        # Waiters look again after every message: the load or the plan may have changed, too.
        self._wake()

    def _wake(self) -> None:
        """Has all look again who wait for a worker."""
        self._changed.set()
        self._changed = asyncio.Event()
