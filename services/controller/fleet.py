"""The workers as the controller sees them: what each serves, and the totals of all."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from helios.registry import WorkerLease
from helios.served import ServedPlan
from helios.v1 import worker_pb2
from helios.worker_watch import WatchedWorker, WatchPace, WorkerWatch
from services.controller.breach_window import BreachWindow
from services.controller.news import News
from services.controller.settings import ControllerSettings
from services.controller.situation import WorkerView
from services.controller.traffic_watch import Served

log = logging.getLogger(__name__)

_REDIAL_SECONDS = 0.5
# Routed prompts that are kept until somebody takes them.
_MOST_PROMPTS = 1000


@dataclass(slots=True)
class Totals:
    """Totals of all workers since this controller watches them."""

    finished: int = 0
    prefilled: int = 0
    generated: int = 0
    high_exit: int = 0


class Worker(WatchedWorker):
    """One worker as this controller knows it."""

    def __init__(self, lease: WorkerLease, settings: ControllerSettings) -> None:
        super().__init__(lease, settings.worker_timeout_seconds)
        self.window = BreachWindow(settings.window_tokens)
        # Whether its telemetry has ended and not restarted.
        self.is_cut_off = False

    @property
    def worker_id(self) -> str:
        """Its name in its lease."""
        return self.lease.worker_id

    @property
    def is_serving(self) -> bool:
        """Whether it answers and accepts sequences."""
        known = self.telemetry is not None and self.status is not None
        return known and not self.is_silent and not (self.telemetry and self.telemetry.draining)

    @property
    def model(self) -> worker_pb2.ModelInfo:
        """The model of its plan. Raises ValueError before its first message."""
        return self._known()[1].model

    @property
    def threads(self) -> int:
        """CPU threads of its engine. Raises ValueError before its first message."""
        return self._known()[1].threads

    @property
    def memory_bytes(self) -> int:
        """Its budget for weights and KV. Raises ValueError before its first message."""
        return self._known()[1].memory_bytes

    @property
    def precision(self) -> str:
        """The precision of its products. Raises ValueError before its first message."""
        return self._known()[1].precision

    @property
    def models(self) -> frozenset[str]:
        """Names of the models that it can load."""
        return frozenset(self.status.models) if self.status is not None else frozenset()

    def heard(self, telemetry: worker_pb2.Telemetry) -> None:
        """Adds its counters to the breach window."""
        self.window.add(telemetry.generated_tokens, telemetry.high_exit_tokens)

    def plan_changed(self) -> None:
        """Starts a new breach window, because earlier tokens may belong to the old plan."""
        self.window.clear()

    def view(self, *, pinned: bool) -> WorkerView:
        """The policy's view of a worker that has sent a message."""
        telemetry, status = self._known()
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

    def _known(self) -> tuple[worker_pb2.Telemetry, worker_pb2.GetStatusResponse]:
        if self.telemetry is None or self.status is None:
            raise ValueError(f"worker {self.worker_id} has not been heard yet")
        return self.telemetry, self.status


class Fleet:
    """All workers with a lease."""

    def __init__(self, redis: Redis, settings: ControllerSettings) -> None:
        self._redis = redis
        self._settings = settings
        self._watch = WorkerWatch[Worker](
            WatchPace(
                telemetry=settings.telemetry_seconds,
                discovery=settings.discovery_seconds,
                redial=_REDIAL_SECONDS,
                timeout=settings.worker_timeout_seconds,
            ),
            make=self._found,
            key=lambda lease: lease.worker_id,
            log=log,
            on_heard=self._heard,
            on_lost=self._lost,
            on_served=self._routed,
            why_forget=lambda worker: "it has stopped answering" if worker.is_silent else "",
        )
        self.totals = Totals()
        # What was served since the last `take_served`, by plan.
        self._served: dict[ServedPlan, Served] = {}
        # The prompts that were routed since the last `take_prompts`.
        self._prompts: deque[worker_pb2.ServedPrompt] = deque(maxlen=_MOST_PROMPTS)
        # Told whenever a worker's telemetry comes.
        self.news = News()

    def problems(self) -> list[str]:
        """Messages that say why workers cannot be found and which ones do not answer."""
        silent = [
            f"{worker.worker_id} at {worker.address} does not answer"
            for worker in self.workers
            if worker.is_silent
        ]
        return [*self._watch.problems(), *silent]

    @property
    def workers(self) -> list[Worker]:
        """All known workers, ordered by id. Safe to call on another thread."""
        return sorted(self._watch.workers, key=lambda worker: worker.worker_id)

    @property
    def serving(self) -> list[Worker]:
        """The workers that answer and accept sequences."""
        return [worker for worker in self.workers if worker.is_serving]

    @property
    def threads(self) -> int:
        """CPU threads of all serving workers."""
        return sum(worker.threads for worker in self.serving)

    @property
    def loadable(self) -> frozenset[str]:
        """Names of the models that at least one serving worker can load."""
        return frozenset().union(*(worker.models for worker in self.serving))

    @property
    def is_settled(self) -> bool:
        """Whether leases have been read, some worker serves, and each has answered or is silent."""
        return bool(self.serving) and all(
            worker.status is not None or worker.is_silent for worker in self.workers
        )

    def find(self, worker_id: str) -> Worker | None:
        """The worker with this id."""
        return self._watch.find(worker_id)

    async def run(self) -> None:
        """Finds workers and reads their telemetry until cancelled. Without Redis the known workers stay."""
        await self._watch.run(self._redis)

    async def close(self) -> None:
        """Closes all connections. Cancel `run` first."""
        await self._watch.close()

    def take_served(self) -> list[Served]:
        """What was served since the last call, by plan."""
        served, self._served = self._served, {}
        return list(served.values())

    def take_prompts(self) -> list[worker_pb2.ServedPrompt]:
        """The prompts that were routed and computed since the last call, the newest last."""
        prompts = list(self._prompts)
        self._prompts.clear()
        return prompts

    def _routed(self, prompts: Sequence[worker_pb2.ServedPrompt]) -> None:
        self._prompts.extend(prompts)

    def _found(self, lease: WorkerLease) -> Worker:
        log.info("worker %s at %s is found", lease.worker_id, lease.address)
        return Worker(lease, self._settings)

    def _lost(self, worker: Worker, why: str) -> None:
        if not worker.is_cut_off:
            log.warning("worker %s: telemetry ended: %s", worker.worker_id, why)
        worker.is_cut_off = True

    def _heard(self, worker: Worker, before: worker_pb2.Telemetry | None, now: worker_pb2.Telemetry) -> None:
        worker.is_cut_off = False
        if before is not None and worker.plan is not None:
            self._count(before, now, worker.plan)
        self.news.tell()

    def _count(self, before: worker_pb2.Telemetry, now: worker_pb2.Telemetry, plan: ServedPlan) -> None:
        if now.generated_tokens < before.generated_tokens:
            return  # Another process under the same name, whose counters begin at zero.
        finished = now.finished_sequences - before.finished_sequences
        self.totals.finished += finished
        self.totals.prefilled += now.prefill_tokens - before.prefill_tokens
        self.totals.generated += now.generated_tokens - before.generated_tokens
        self.totals.high_exit += now.high_exit_tokens - before.high_exit_tokens
        if (before.model, before.depth) != (plan.model, plan.depth):
            return  # These counts belong to both plans.
        served = Served(
            plan,
            finished,
            now.confidence_tokens - before.confidence_tokens,
            now.confidence_nats - before.confidence_nats,
            now.prompts_read - before.prompts_read,
            now.prompt_tokens_read - before.prompt_tokens_read,
            now.prompt_nats - before.prompt_nats,
        )
        self._served[plan] = served if plan not in self._served else self._served[plan].plus(served)
