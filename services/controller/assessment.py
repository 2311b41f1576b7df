"""Asks the profiler to evaluate the candidates on recent requests (arXiv 2504.10724)."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc

from helios import channel
from helios.v1 import profiler_pb2, profiler_pb2_grpc
from services.controller.agenda import Evaluate
from services.controller.settings import ControllerSettings


@dataclass(frozen=True, slots=True)
class Assessment:
    """The cost of an evaluation, and what went wrong as text; empty if nothing did."""

    cpu_seconds: float = 0.0
    """Without the one-time work for a model: loading it and timing its steps."""
    problem: str = ""
    for_router: bool = False
    """Whether it found examples for a router, not profiles."""


class Assessor:
    """Has the profiler evaluate candidates in the background, one evaluation at a time."""

    def __init__(
        self,
        settings: ControllerSettings,
        candidates: Callable[[], Awaitable[tuple[str, ...]]],
        on_end: Callable[[], None],
    ) -> None:
        """candidates: the models for an evaluation that names none. on_end: called when one has ended."""
        self._settings = settings
        self._candidates = candidates
        self._on_end = on_end
        self._running: asyncio.Task[Assessment] | None = None
        # What went wrong in the last evaluation, as text. Empty if nothing did.
        self.problem = ""

    @property
    def has_profiler(self) -> bool:
        """Whether there is a profiler to ask."""
        return self._settings.profiler is not None

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation is running, or has ended and was not taken yet."""
        return self._running is not None

    def begin(self, due: Evaluate, *, is_history_empty: bool) -> None:
        """Begins an evaluation. With an empty history it waits longer for the profiler to be ready."""
        address = self._settings.profiler
        if address is None:
            raise ValueError("there is no profiler to ask")
        # A profiler that has just started still imports its engine. With a history the result is not urgent.
        connect_seconds = (
            self._settings.evaluate_timeout_seconds
            if is_history_empty
            else self._settings.worker_timeout_seconds
        )
        self._running = asyncio.create_task(self._evaluate(address, due, connect_seconds))
        self._running.add_done_callback(lambda _: self._on_end())

    def take_ended(self) -> Assessment | None:
        """The evaluation that has ended since the last call. None: none has.

        Raises the errors of `candidates`.
        """
        if self._running is None or not self._running.done():
            return None
        ended, self._running = self._running, None
        assessment = ended.result()
        self.problem = assessment.problem
        return assessment

    async def close(self) -> None:
        """Cancels the running evaluation."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _evaluate(self, address: str, due: Evaluate, connect_seconds: float) -> Assessment:
        candidates = await self._candidates()
        return await evaluate(
            address,
            [name for name in candidates if not due.models or name in due.models],
            due,
            connect_seconds=connect_seconds,
            timeout_seconds=self._settings.evaluate_timeout_seconds,
        )


async def evaluate(
    address: str, models: Sequence[str], due: Evaluate, *, connect_seconds: float, timeout_seconds: float
) -> Assessment:
    """Has the profiler at `address` evaluate the models as `due` says. The results go to Redis."""
    cpu_seconds = 0.0
    request = profiler_pb2.EvaluateRequest(
        models=models,
        requests=due.requests,
        fresh=due.fresh,
        newest_seconds=due.newest_seconds,
        prompts_only=due.prompts_only,
        for_router=due.for_router,
    )
    try:
        async with channel.to_service_async(address) as opened:
            async with asyncio.timeout(connect_seconds):
                await opened.channel_ready()
            stub: profiler_pb2_grpc.ProfilerServiceAsyncStub
            stub = profiler_pb2_grpc.ProfilerServiceStub(opened)
            async for response in stub.Evaluate(request, timeout=timeout_seconds):
                if response.WhichOneof("event") in ("result", "router_result"):
                    result = response.router_result if due.for_router else response.result
                    cpu_seconds += max(0.0, result.cpu_seconds - result.once_cpu_seconds)
    except grpc.aio.AioRpcError as error:
        said = f"{error.code().name}, {error.details()}"
    except TimeoutError:
        said = "it cannot be reached"
    else:
        return Assessment(cpu_seconds, for_router=due.for_router)
    return Assessment(
        cpu_seconds,
        f"the profiler at {address} did not evaluate, decisions rest on the last profiles: {said}",
        due.for_router,
    )
