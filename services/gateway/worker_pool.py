"""The workers that this gateway knows: which of them accept streams, and which is the best for a stream."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import grpc
from redis.asyncio import Redis

from helios import redis_client
from helios.errors import UnavailableError, UnknownModelError
from helios.registry import WorkerLease
from helios.served import ServedPlan
from helios.v1 import inference_pb2, worker_pb2
from helios.worker_watch import WatchedWorker, WatchPace, WorkerWatch
from services.gateway.admission import EventRate
from services.gateway.router import Candidate, Needs, Ranking, choose
from services.gateway.settings import GatewaySettings
from services.gateway.worker_call import Attempt, Take, WorkerCall

log = logging.getLogger(__name__)

_WORKER_OPTIONS = (
    # Tokenizers of large vocabularies exceed gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
)
# Limits a status message, because it travels in HTTP/2 trailers, which hold about 8 KiB.
_WORKERS_TOLD = 5
# Stands for the model of a worker that has not been reached.
_UNKNOWN_MODEL = worker_pb2.ModelInfo()


class Worker(WatchedWorker):
    """One worker as this gateway knows it."""

    def __init__(
        self, lease: WorkerLease, settings: GatewaySettings, on_acquitted: Callable[[], None]
    ) -> None:
        """`on_acquitted`: see WorkerCall."""
        super().__init__(lease, settings.worker_timeout_seconds, _WORKER_OPTIONS)
        # After this much silence the worker may be dead.
        self._settings = settings
        self._overdue_seconds = (settings.telemetry_seconds + settings.worker_timeout_seconds) / 2
        self._on_acquitted = on_acquitted
        # Why it accepts no streams. Empty if it does.
        self.problem = "it has not been reached yet"
        # Number of streams of this gateway.
        self.open_streams = 0
        # Number of sequences in the last telemetry that belong to others.
        self._foreign_sequences = 0
        # How often one of its places becomes free, and how many sequences had ended there at the last look.
        self._ends = EventRate(settings.rate_window_seconds)
        self._ended: int | None = None
        self._call: WorkerCall | None = None

    @property
    def ready(self) -> bool:
        """Whether it accepts streams."""
        return not self.problem

    @property
    def worker_id(self) -> str:
        """The worker's own id. Empty until it has been reached."""
        return "" if self.telemetry is None else self.telemetry.worker_id

    @property
    def model(self) -> worker_pb2.ModelInfo:
        """The model that it serves. Has no name until the worker has been reached."""
        return _UNKNOWN_MODEL if self.status is None else self.status.model

    @property
    def models(self) -> frozenset[str]:
        """The names of the models of its plans. Empty until it has been reached."""
        return frozenset(plan.model for plan in self.plans)

    @property
    def chat_template_ids(self) -> Mapping[str, str]:
        """By model of its plans, the id of its chat template. Models without one are missing."""
        return {} if self.status is None else self.status.chat_template_ids

    @property
    def has_router(self) -> bool:
        """Whether it chooses the plans of requests that ask for it."""
        return self.telemetry is not None and self.telemetry.router_number > 0

    @property
    def suspects(self) -> int:
        """Number of streams here under which another worker has failed and which have not settled."""
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
        """A stream on this worker. It counts as load, and is ended there if it outlives the block.

        `take` gets its tokens. `suspect`: whether another worker has failed under it.
        """
        if self._call is None or self._call.ended:
            self._call = WorkerCall(self.stub, self.address, self._on_acquitted)
        call = self._call
        # If the worker has just died unnoticed, this stream is not the cause.
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
        """Ends all its streams with WorkerFailedError, because the worker is lost."""
        if self._call is not None:
            self._call.close(self.problem)
            self._call = None

    def heard(self, telemetry: worker_pb2.Telemetry) -> None:
        """Computes the load that others put on it, and how fast its sequences end."""
        # A smaller number is that of another process.
        if self._ended is not None and telemetry.finished_sequences > self._ended:
            self._ends.observe(time.monotonic(), telemetry.finished_sequences - self._ended)
        self._ended = telemetry.finished_sequences
        self._foreign_sequences = max(0, telemetry.running + telemetry.waiting - self.open_streams)

    def candidate(self) -> Candidate | None:
        """The router's view of it. None while it is not ready."""
        if self.problem or self.telemetry is None or self.status is None or not self.plans:
            return None
        seconds = self._ends.seconds_between(time.monotonic())
        return Candidate(
            address=self.address,
            plans=self.plans,
            tokenizer_id=self.model.tokenizer_id,
            context_tokens=self.model.context_tokens,
            sequences=self.open_streams + self._foreign_sequences,
            free_share=self.telemetry.blocks_free / max(1, self.telemetry.blocks_total),
            suspects=self.suspects,
            places=self.status.max_running,
            seconds_per_place=self._settings.overload_retry_seconds if seconds is None else seconds,
        )

    def state(self) -> inference_pb2.WorkerState:
        """The worker's entry in GetServingStatus."""
        return inference_pb2.WorkerState(
            worker_id=self.worker_id,
            address=self.address,
            ready=self.ready,
            reason=self.problem,
            telemetry=self.telemetry,
            open_streams=self.open_streams,
        )


class WorkerPool:
    """Knows which workers accept streams, and picks the best one for a stream."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._watch = WorkerWatch[Worker](
            WatchPace(
                telemetry=settings.telemetry_seconds,
                discovery=settings.discovery_seconds,
                redial=settings.redial_seconds,
                timeout=settings.worker_timeout_seconds,
            ),
            make=lambda lease: Worker(lease, settings, self._wake),
            # Workers from the settings have no id before they are reached.
            key=lambda lease: lease.address,
            log=log,
            on_heard=self._heard,
            on_lost=self._set_problem,
            on_silent=self._give_up,
            why_forget=lambda worker: "" if worker.open_streams else worker.problem,
        )
        self._watching: asyncio.Task[None] | None = None
        self._redis: Redis | None = None
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Starts to look for workers and to watch them."""
        for address in self._settings.worker_addresses:
            self._watch.add_fixed(address)
        if self._settings.redis_url:
            self._redis = redis_client.connect(
                self._settings.redis_url, self._settings.worker_timeout_seconds
            )
        self._watching = asyncio.create_task(self._watch.run(self._redis))

    async def close(self) -> None:
        """Stops watching and closes all connections."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._watch.close()
        if self._redis is not None:
            await self._redis.aclose()

    @property
    def workers(self) -> Sequence[Worker]:
        """All known workers, ready or not."""
        return self._watch.workers

    def problems(self) -> list[str]:
        """Messages about what cannot be reached at the moment."""
        found = self._watch.problems()
        if not any(worker.ready for worker in self.workers):
            found.append(f"no worker is ready: {self._waited_for()}")
        return found

    def choose(
        self,
        needs: Needs,
        *,
        prefer: ServedPlan | None = None,
        ranking: Ranking | None = None,
        avoid: Set[str] = frozenset(),
        exclude: Set[str] = frozenset(),
        alone: bool = False,
    ) -> Worker | None:
        """The ready worker that should take a stream (router.choose), or None."""
        chosen = choose(
            self._candidates(),
            needs,
            prefer=prefer,
            ranking=ranking,
            avoid=avoid,
            exclude=exclude,
            alone=alone,
        )
        return None if chosen is None else self._watch.find(chosen.address)

    def context_tokens(self, needs: Needs) -> int:
        """The longest context among the ready workers that meet the needs. 0 if there are none."""
        return max((one.context_tokens for one in self._candidates() if needs.met_by(one)), default=0)

    def chat_models(self, template_id: str = "") -> frozenset[str]:
        """The models of ready workers that have a chat template. template_id: only those with this one."""
        return frozenset(
            model
            for worker in self.workers
            if worker.ready
            for model, found in worker.chat_template_ids.items()
            if template_id in ("", found)
        )

    def served_models(self) -> frozenset[str]:
        """The models of ready workers."""
        return frozenset[str]().union(*(worker.models for worker in self.workers if worker.ready))

    async def wait_for(
        self,
        needs: Needs,
        *,
        prefer: ServedPlan | None = None,
        ranking: Ranking | None = None,
        avoid: Set[str] = frozenset(),
        alone: bool = False,
        under_way: bool = False,
    ) -> Worker:
        """Like `choose`, but waits `worker_wait_seconds` for a worker.

        Raises UnavailableError, which says what was waited for, if none came. Raises UnknownModelError at
        once if workers are ready and no known worker serves the model. A stream that is `under_way`, or whose
        plans are ranked, waits even then, because its model has been served and may come back.
        """
        seconds = self._settings.worker_wait_seconds
        try:
            async with asyncio.timeout(seconds):
                while (
                    worker := self.choose(needs, prefer=prefer, ranking=ranking, avoid=avoid, alone=alone)
                ) is None:
                    if not under_way and ranking is None:
                        self._check_model_is_served(needs)
                    await self._changed.wait()
        except TimeoutError:
            what = " or ".join(sorted(needs.models)) or "any model"
            if ranking is not None:
                what = " or ".join(str(one.plan) for one in ranking.plans)
            raise UnavailableError(
                f"waited {seconds:g} s for a worker that serves {what}: {self._waited_for()}"
            ) from None
        return worker

    async def changed(self) -> None:
        """Waits for a change of any worker or of its streams, at most until the next telemetry."""
        await self._changed.wait()

    def suspect(self, worker: Worker, problem: str) -> None:
        """Excludes a worker until its next telemetry, because a stream found that it does not serve."""
        self._set_problem(worker, problem)

    def _candidates(self) -> Iterator[Candidate]:
        for worker in self.workers:
            candidate = worker.candidate()
            if candidate is not None:
                yield candidate

    def _check_model_is_served(self, needs: Needs) -> None:
        served = frozenset[str]().union(*(worker.models for worker in self.workers))
        ready = any(worker.ready for worker in self.workers)
        # A worker that has not been reached yet may serve the model.
        all_known = all(worker.models for worker in self.workers)
        if needs.models and ready and all_known and not needs.models & served:
            asked = " or ".join(sorted(needs.models))
            message = f"model {asked} is not served; served are {', '.join(sorted(served))}"
            loadable = {name for worker in self.workers if worker.status for name in worker.status.models}
            if found := sorted(needs.models & loadable):
                message += (
                    f". Workers can load {found[0]}: serve it with `helios up --model {found[0]}`, or with "
                    f"`helios pin --model {found[0]} --depth LAYERS` if its tokenizer is theirs"
                )
            raise UnknownModelError(message)

    def _waited_for(self) -> str:
        if not self.workers:
            if problems := self._watch.problems():
                return "; ".join(problems)
            if self._settings.redis_url:
                return "no worker has announced itself in Redis; start one"
            return "this gateway has neither a Redis URL nor a list of workers; set one"
        found = [
            f"{worker.worker_id or 'worker'} at {worker.address}: {worker.problem or _serves(worker)}"
            for worker in self.workers
        ]
        more = len(found) - _WORKERS_TOLD
        return "; ".join(found[:_WORKERS_TOLD] + ([f"and {more} more"] if more > 0 else []))

    def _heard(self, worker: Worker, _: worker_pb2.Telemetry | None, telemetry: worker_pb2.Telemetry) -> None:
        sequences = telemetry.running + telemetry.waiting
        if sequences and telemetry.step_age_seconds > self._settings.engine_timeout_seconds:
            stuck = f"no step for {telemetry.step_age_seconds:.1f} s with {sequences} sequences"
            self._set_problem(worker, f"its engine hangs: {stuck}")
            worker.give_up_streams()
        else:
            self._set_problem(worker, "it is draining" if telemetry.draining else "")

    def _give_up(self, worker: Worker) -> None:
        """Gives up a silent worker and releases its streams."""
        if worker.ready:
            timeout = self._settings.worker_timeout_seconds
            self._set_problem(worker, f"it has sent no telemetry for {timeout:g} s")
        worker.give_up_streams()

    def _set_problem(self, worker: Worker, problem: str) -> None:
        if problem != worker.problem:
            if problem:
                log.warning("worker %s at %s takes no streams: %s", worker.worker_id, worker.address, problem)
            else:
                log.info("worker %s at %s is ready: %s", worker.worker_id, worker.address, _serves(worker))
        worker.problem = problem
        # Waiters check again after every message, because the load or the plan may have changed.
        self._wake()

    def _wake(self) -> None:
        """Makes everyone who waits for a worker check again."""
        self._changed.set()
        self._changed = asyncio.Event()


def _serves(worker: Worker) -> str:
    return f"serves {' and '.join(map(str, worker.plans))}"
