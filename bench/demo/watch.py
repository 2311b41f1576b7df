"""Serves the phases on a stack that follows them, and records what the stack does."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from bench.demo.phases import PHASES, STREAMS
from bench.demo.progress import Progress, Show
from bench.demo.stack import ANSWER_SECONDS
from bench.demo.timeline import Mark, Sample, Timeline, WorkerSample, in_words
from bench.load import clients
from bench.load.clients import Stream
from bench.load.traffic import Phase, Traffic
from helios.client import AsyncClient, error_from
from helios.errors import UnavailableError
from helios.rates import rates
from helios.slo import Slo
from helios.stack_state import StackState
from helios.v1 import controller_pb2, controller_pb2_grpc, inference_pb2, worker_pb2

_SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Followed:
    """What a stack did. `began`: the start of the timeline, in seconds of the monotonic clock.

    streams: every stream, by phase.
    """

    began: float
    timeline: Timeline
    streams: Mapping[str, list[Stream]]


async def follow(
    system: str, state: StackState, traffic: Traffic, phase_seconds: float, show: Show
) -> Followed:
    """Serves one phase after the other on a stack. `system` names it in the progress."""
    async with (
        clients.connect(state.gateway) as gateway,
        clients.connect(state.controller) as controller,
        AsyncClient(state.gateway) as client,
    ):
        began = time.monotonic()
        watch = _Watch(system, client, phase_seconds * len(PHASES), show)
        beside = [
            asyncio.create_task(watch.sample()),
            asyncio.create_task(watch.read_decisions(controller)),
        ]
        streams: dict[str, list[Stream]] = {}
        phases = []
        try:
            for phase in PHASES:
                entered = watch.enter(phase)
                requests = traffic.requests(phase, phase_seconds)
                serving = asyncio.create_task(
                    clients.run(clients.through_gateway(gateway), requests, STREAMS)
                )
                await asyncio.wait({serving, *beside}, return_when=asyncio.FIRST_COMPLETED)
                for task in beside:
                    if task.done():
                        serving.cancel()
                        task.result()
                streams[phase.name] = await serving
                phases.append((phase.name, entered, watch.seconds))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
    bound = Slo().max_perplexity_increase
    return Followed(began, Timeline(tuple(phases), tuple(watch.samples), tuple(watch.marks), bound), streams)


class _Watch:
    """Takes samples of the workers, and reads decisions, while the traffic is served."""

    def __init__(self, system: str, client: AsyncClient, total_seconds: float, show: Show) -> None:
        self.samples: list[Sample] = []
        self._system = system
        self._client = client
        self._total_seconds = total_seconds
        self._show = show
        self._began = time.time()
        self._phase = PHASES[0]
        self._before: dict[str, worker_pb2.Telemetry] = {}
        self._last: dict[str, WorkerSample] = {}
        self._decisions: dict[int, controller_pb2.Decision] = {}

    @property
    def seconds(self) -> float:
        """The time since the traffic began."""
        return time.time() - self._began

    @property
    def marks(self) -> list[Mark]:
        """The decisions so far."""
        marks: list[Mark] = []
        at_first = self.samples[0].workers if self.samples else ()
        before = in_words(plan for worker in at_first for plan in worker.plans)
        for number, decision in sorted(self._decisions.items()):
            plan = in_words((one.model, one.depth) for one in decision.chosen)
            seconds = decision.time - self._began
            # A decision from before the traffic comes again when its outcome is known: it is not counted.
            if seconds >= 0:
                marks.append(Mark(number, seconds, decision.trigger, plan != before, plan, decision.reason))
            before = plan
        return marks

    def enter(self, phase: Phase) -> float:
        """Begins the next phase. Returns when it began, in seconds since the traffic began."""
        self._phase = phase
        return self.seconds

    async def sample(self) -> None:
        """Takes samples of the workers until cancelled. Raises HeliosError when the gateway is gone."""
        while True:
            status = await self._client.status(ANSWER_SECONDS)
            self._take(status)
            self._show(
                Progress(
                    f"{self._system}: {self._phase.name} prompts",
                    self.seconds,
                    self._total_seconds,
                    self.samples,
                    self.marks,
                )
            )
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def read_decisions(self, channel: grpc.aio.Channel) -> None:
        """Reads decisions as they are made, until cancelled. Raises UnavailableError without a controller."""
        stub: controller_pb2_grpc.ControllerServiceAsyncStub
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        try:
            async for response in stub.WatchDecisions(controller_pb2.WatchDecisionsRequest(history=0)):
                self._decisions[response.decision.number] = response.decision
        except grpc.aio.AioRpcError as error:
            raise error_from(error, "the controller") from error
        raise UnavailableError("the controller ended the record of its decisions; is it running?")

    def _take(self, status: inference_pb2.GetServingStatusResponse) -> None:
        workers = []
        for worker in sorted(status.workers, key=lambda one: one.worker_id):
            now = worker.telemetry
            if not now.model:
                continue
            before, last = self._before.get(worker.worker_id), self._last.get(worker.worker_id)
            done = rates(now, before)
            rate, cbc = done.tokens_per_second, done.cbc
            if before is not None and last is not None and now.time == before.time:
                # No telemetry since the last sample: the last known rate is used again.
                rate, cbc = last.tokens_per_second, last.cbc
            self._before[worker.worker_id] = now
            plans = tuple((one.plan.model, one.plan.depth) for one in now.plans)
            running = tuple((one.plan.model, one.plan.depth) for one in now.plans if one.running)
            sample = WorkerSample(worker.worker_id, plans, running, rate, cbc)
            self._last[worker.worker_id] = sample
            workers.append(sample)
        if workers:
            self.samples.append(Sample(self.seconds, self._phase.name, tuple(workers)))
