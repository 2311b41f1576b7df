"""WorkerService: one engine over gRPC."""

import asyncio
import contextlib
import itertools
import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode

from helios import catalog, telemetry
from helios.engine.interface import Output, Reloaded, ServedPrompt, ServingEngine
from helios.errors import (
    HeliosError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
    status_of,
)
from helios.routing.preference import Preference
from helios.routing.router import Router
from helios.routing.unlike_prompts import UnlikePrompts
from helios.sampling import SamplingParams
from helios.served import ServedPlan
from helios.server import abort
from helios.v1 import generation_pb2, worker_pb2, worker_pb2_grpc
from services.worker.choice import RoutedChoice, named_plan, plan_message
from services.worker.first_plan import LoadedPlan, PlanFile
from services.worker.metrics import Latency, observe_load
from services.worker.outbox import Delivery, Outbox
from services.worker.sequence import ServedSequence
from services.worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_MIN_TELEMETRY_SECONDS = 0.05
_DEFAULT_TELEMETRY_SECONDS = 0.5
_DEFAULT_DRAIN_SECONDS = 30.0


@dataclass(slots=True)
class _Ending:
    """How a sequence of a call ends. `end` is done when its end has been sent.

    `sequence` is None until the engine has taken it.
    """

    end: "asyncio.Future[HeliosError | None]"
    sequence: ServedSequence | None = None


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """Serves `engine`, which runs in its own thread. Create it on the event loop."""

    def __init__(
        self,
        engine: ServingEngine,
        settings: WorkerSettings,
        models_dir: Path,
        worker_id: str,
        plan_file: PlanFile,
        router: Router | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._models_dir = models_dir
        self._worker_id = worker_id
        self._plan_file = plan_file
        self._router = router
        self._unlike = UnlikePrompts()
        # By model, the plans that its exits allow. Read once, because that takes a look at its files.
        self._plans_of: dict[str, frozenset[ServedPlan]] = {}
        self._delivery = Delivery()
        self._numbers = itertools.count()
        self._streams: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        # Set, and replaced by a new event, when the plan has changed or draining has begun.
        self._changed = asyncio.Event()
        self._latency = Latency()
        observe_load(engine, worker_id)

    async def Generate(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes as well
        self, request: worker_pb2.WorkerServiceGenerateRequest, context: _Context
    ) -> None:
        """Generates one sequence, from its prompt and the tokens already emitted to its end."""
        outbox = Outbox()
        parent = telemetry.extract(context.invocation_metadata())
        try:
            with self._sequence(
                request, context.time_remaining(), parent, partial(self._delivery.send, outbox, 0)
            ) as sequence:
                while True:
                    outputs = [output for _, output in await outbox.take()]
                    response = worker_pb2.WorkerServiceGenerateResponse()
                    for output in outputs:
                        _add_tokens(response.chunk, output)
                    if response.chunk.tokens:
                        await context.write(response)
                    end = outputs[-1]
                    if end.finish is not None:
                        await context.write(sequence.finish(end.finish))
                        return
                    if (redirect := sequence.redirect(end.error)) is not None:
                        await context.write(redirect)
                        return
                    if end.error is not None:
                        raise end.error
        except HeliosError as error:
            failure = error
        await abort(context, failure)

    async def GenerateMany(  # type: ignore[override]  # as Generate
        self, request_iterator: AsyncIterator[worker_pb2.GenerateManyRequest], context: _Context
    ) -> None:
        """Generates many sequences. The output of one step for all of them is sent in one message."""
        outbox = Outbox()
        ends: dict[int, _Ending] = {}
        async with asyncio.TaskGroup() as writing:
            writer = writing.create_task(_write(outbox, ends, context))
            async with asyncio.TaskGroup() as sequences:
                async for request in request_iterator:
                    number = request.start.sequence if request.HasField("start") else request.cancel
                    if (running := ends.pop(number, None)) is not None:
                        running.end.cancel()
                    if request.HasField("start"):
                        ends[number] = _Ending(asyncio.get_running_loop().create_future())
                        sequences.create_task(self._run(request.start, outbox, ends[number]))
            writer.cancel()

    async def _run(self, start: worker_pb2.SequenceStart, outbox: Outbox, ending: _Ending) -> None:
        """Runs one sequence of a call, until its end has been sent or it is cancelled."""
        parent = telemetry.extract(start.trace_context.items())
        seconds = start.timeout_seconds if start.HasField("timeout_seconds") else None
        try:
            with self._sequence(
                start.request, seconds, parent, partial(self._delivery.send, outbox, start.sequence)
            ) as sequence:
                ending.sequence = sequence
                if (error := await ending.end) is not None:
                    raise error
        except HeliosError as error:
            if not ending.end.done():
                outbox.put(start.sequence, Output(error=error))
        except Exception:
            log.exception("sequence %s failed", start.request.request_id)
            failure = HeliosError(f"the worker failed on {start.request.request_id}; its log has the cause")
            outbox.put(start.sequence, Output(error=failure))

    @contextmanager
    def _sequence(
        self,
        request: worker_pb2.WorkerServiceGenerateRequest,
        seconds: float | None,
        parent: Context,
        sink: Callable[[Output], None],
    ) -> Iterator[ServedSequence]:
        """A sequence in the engine and its span. Both end with the block.

        `seconds` is the time until its deadline. Raises the HeliosError with which it is refused.
        """
        failure: HeliosError | None = None
        attributes = {"helios.request_id": request.request_id}
        with telemetry.span("Generate", parent, SpanKind.SERVER, attributes) as span:
            try:
                with self._submitted(request, seconds, span, sink) as sequence:
                    yield sequence
            except HeliosError as error:
                failure = error
                span.set_status(StatusCode.ERROR, error.message)
        if failure is not None:
            raise failure

    @contextmanager
    def _submitted(
        self,
        request: worker_pb2.WorkerServiceGenerateRequest,
        seconds: float | None,
        span: Span,
        sink: Callable[[Output], None],
    ) -> Iterator[ServedSequence]:
        if self._draining:
            raise UnavailableError(f"worker {self._worker_id} is draining; send the request to another")
        plan = named_plan(request, self._engine.served.plans)
        preference = Preference.from_proto(request.route)
        # A request that goes on has a plan already, so it is not routed again.
        is_routed = request.HasField("route") and not request.emitted_ids
        choice = self._choice(request, preference) if is_routed else None
        if not request.sampling.HasField("max_tokens") or not request.sampling.HasField("seed"):
            raise InvalidRequestError(
                "sampling.max_tokens and sampling.seed must be set on a worker's request"
            )
        sampling = SamplingParams.from_proto(request.sampling, default_max_tokens=0, default_seed=0)
        # Callers may reuse a request id, so each sequence gets its own id inside the engine.
        name = f"{request.request_id}#{next(self._numbers)}"
        submitted = self._engine.submit(
            name,
            list(request.prompt_ids),
            sampling,
            sink,
            emitted_ids=list(request.emitted_ids),
            deadline=None if seconds is None else time.monotonic() + seconds,
            plan=plan,
            route=choice,
        )
        lacks_router = is_routed and choice is None and preference != Preference()
        sequence = ServedSequence(submitted, choice, lacks_router)
        self._streams.add(name)
        self._idle.clear()
        try:
            yield sequence
        finally:
            # Also reached when the client disconnected or the deadline passed. The engine frees the KV at
            # once.
            self._engine.cancel(name)
            self._streams.discard(name)
            if not self._streams:
                self._idle.set()
            tokens = submitted.completion_tokens - len(request.emitted_ids)
            self._latency.record(submitted.times, tokens, submitted.plan)
            span.set_attribute("helios.emitted_before", len(request.emitted_ids))
            sequence.record(span)
            log.info(
                "sequence %s ended, %d of %d tokens",
                name,
                submitted.completion_tokens,
                sampling.max_tokens,
            )

    def _choice(
        self, request: worker_pb2.WorkerServiceGenerateRequest, preference: Preference
    ) -> RoutedChoice | None:
        """The choice of a plan by the router, among those of a model if it names one. None: no router."""
        if self._router is None:
            return None
        among = self._plans(request.model) if request.model else None
        return RoutedChoice(self._router, preference, request.request_id, among, self._unlike)

    def _plans(self, model: str) -> frozenset[ServedPlan]:
        """All plans of a model, in force or not."""
        if model not in self._plans_of:
            try:
                depths = catalog.find_model(self._models_dir, model).exit_layers
            except HeliosError:
                # Its files are gone. What is in force can still be served.
                return frozenset(plan for plan in self._engine.served.plans if plan.model == model)
            self._plans_of[model] = frozenset(ServedPlan(model=model, depth=depth) for depth in depths)
        return self._plans_of[model]

    async def Reload(
        self, request: worker_pb2.ReloadRequest, context: _Context
    ) -> AsyncIterator[worker_pb2.ReloadResponse]:
        """Loads other plans in a separate thread while serving, and reports its stages."""
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        stages: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

        def progress(loaded: int, total: int) -> None:
            loop.call_soon_threadsafe(stages.put_nowait, (loaded, total))

        def reload() -> Reloaded:
            first_path, first = self._wanted(request)
            others = [self._wanted(one) for one in request.also]
            named = [first.plan, *(one.plan for _, one in others)]
            if twice := [plan for plan, times in Counter(named).items() if times > 1]:
                raise InvalidRequestError(f"{twice[0]} is named more than once")
            also = [one.to_load(path) for path, one in others]
            reloaded = self._engine.reload(
                first_path,
                first.plan.depth,
                progress,
                first.threshold,
                also=also,
                urgent=request.urgent,
            )
            self._plan_file.write(first.plan, first.threshold, tuple(one for _, one in others))
            return reloaded

        self._plans_of.clear()
        task = asyncio.ensure_future(asyncio.to_thread(reload))
        # Also announces the end if the caller has disconnected meanwhile.
        task.add_done_callback(lambda _: self._announce())
        loaded = total = 0
        while not task.done() or not stages.empty():
            stage = asyncio.ensure_future(stages.get())
            await asyncio.wait({task, stage}, return_when=asyncio.FIRST_COMPLETED)
            if not stage.done():
                stage.cancel()
                continue
            loaded, total = stage.result()
            yield worker_pb2.ReloadResponse(
                stage=(
                    worker_pb2.RELOAD_STAGE_LOADING if loaded < total else worker_pb2.RELOAD_STAGE_SWAPPING
                ),
                layers_loaded=loaded,
                layers_total=total,
                seconds=time.monotonic() - began,
            )
        try:
            result = task.result()
        except HeliosError as error:
            also = "".join(f", {one.model} depth {one.depth}" for one in request.also)
            log.warning("reload to %s depth %d%s failed: %s", request.model, request.depth, also, error)
            await abort(context, error)
        served = ", ".join(f"{plan.model} depth {plan.depth}" for plan in self._engine.served.plans)
        log.info("serving %s", served)
        yield worker_pb2.ReloadResponse(
            stage=worker_pb2.RELOAD_STAGE_DONE,
            layers_loaded=loaded,
            layers_total=total,
            seconds=time.monotonic() - began,
            bytes_read=result.bytes_read,
            sequences_moved=result.sequences_moved,
            stall_seconds=result.stall_seconds,
        )

    def _wanted(self, message: worker_pb2.ReloadRequest | worker_pb2.PlanToLoad) -> tuple[Path, LoadedPlan]:
        """The checkpoint and the plan that a reload names. Raises HeliosError."""
        entry = catalog.find_model(self._models_dir, message.model)
        threshold = message.threshold if message.HasField("threshold") else None
        if threshold is not None and not 0 <= threshold <= 1:
            raise InvalidRequestError(f"threshold must be in [0, 1], not {threshold}")
        share = 1.0
        if isinstance(message, worker_pb2.PlanToLoad) and message.HasField("share"):
            share = message.share
        if not 0 < share < math.inf:
            raise InvalidRequestError(f"share must be a finite number above 0, not {share}")
        plan = ServedPlan(model=entry.name, depth=message.depth or entry.num_layers)
        return entry.path, LoadedPlan(plan=plan, threshold=threshold, share=share)

    async def SetRouter(
        self, request: worker_pb2.SetRouterRequest, context: _Context
    ) -> worker_pb2.SetRouterResponse:
        """Replaces the router, or takes it away. One that cannot be used is refused and changes nothing."""
        try:
            router = Router.from_json(request.router) if request.router else None
        except InvalidRequestError as error:
            log.warning("a router was refused: %s", error)
            await abort(context, error)
        self._router = router
        log.info("requests are not routed" if router is None else f"routing by router {router.number}")
        self._announce()
        return worker_pb2.SetRouterResponse()

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: _Context
    ) -> worker_pb2.GetStatusResponse:
        """The plans, the limits and the load."""
        served, limits = self._engine.served, self._engine.limits
        models = await asyncio.to_thread(catalog.list_models, self._models_dir)
        return worker_pb2.GetStatusResponse(
            telemetry=self._telemetry(),
            model=worker_pb2.ModelInfo(
                name=served.plan.model,
                depth=served.plan.depth,
                num_layers=served.num_layers,
                exit_layers=served.exit_layers,
                vocab_size=served.vocab_size,
                context_tokens=served.context_tokens,
                tokenizer_id=served.tokenizer_id,
                weight_bytes=served.weight_bytes,
                kv_bytes_per_token=served.kv_bytes_per_token,
                threshold=served.threshold,
            ),
            exit_mode=limits.exit_mode.value,
            models=[entry.name for entry in models],
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            step_token_budget=limits.step_token_budget,
            block_tokens=limits.block_tokens,
            device=limits.device,
            precision=served.precision,
            threads=self._settings.threads,
            bytes_read=served.bytes_read,
            resident_bytes=_resident_bytes(),
            memory_bytes=served.memory_bytes,
            plans=[plan_message(plan) for plan in served.plans],
            chat_template_ids={
                model: template.template_id for model, template in served.chat_templates.items()
            },
        )

    async def WatchTelemetry(
        self, request: worker_pb2.WatchTelemetryRequest, context: _Context
    ) -> AsyncIterator[worker_pb2.WatchTelemetryResponse]:
        """The load, at an interval and whenever the plans change, until the caller disconnects.

        A caller that asks for served prompts gets each one once, at first those that the engine still has.
        """
        interval = _DEFAULT_TELEMETRY_SECONDS
        if request.HasField("interval_seconds"):
            interval = request.interval_seconds
        if not interval >= _MIN_TELEMETRY_SECONDS:
            message = f"interval_seconds must be at least {_MIN_TELEMETRY_SECONDS}, not {interval}"
            await abort(context, InvalidRequestError(message))
        last_prompt = 0
        while True:
            changed = self._changed
            response = worker_pb2.WatchTelemetryResponse(telemetry=self._telemetry())
            if request.served_prompts and (prompts := self._engine.served_prompts(last_prompt)):
                last_prompt = prompts[-1].number
                response.served_prompts.extend(map(_served_prompt, prompts))
            yield response
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await changed.wait()

    async def GetTokenizer(
        self, request: worker_pb2.GetTokenizerRequest, context: _Context
    ) -> worker_pb2.GetTokenizerResponse:
        """The tokenizer of the plan, for gateways."""
        served = self._engine.served
        return worker_pb2.GetTokenizerResponse(
            tokenizer_id=served.tokenizer_id, tokenizer_json=served.tokenizer_json
        )

    async def GetChatTemplate(
        self, request: worker_pb2.GetChatTemplateRequest, context: _Context
    ) -> worker_pb2.GetChatTemplateResponse:
        """The chat template of one of the models, for gateways."""
        template = self._engine.served.chat_templates.get(request.model)
        if template is None:
            error = UnknownModelError(f"no model {request.model} with a chat template is served here")
            await abort(context, error)
        return worker_pb2.GetChatTemplateResponse(
            chat_template_id=template.template_id,
            template=template.text,
            special_tokens=template.special_tokens,
            source=template.source,
        )

    async def Drain(self, request: worker_pb2.DrainRequest, context: _Context) -> worker_pb2.DrainResponse:
        """Stops accepting sequences and waits for the running ones."""
        grace = request.grace_seconds if request.HasField("grace_seconds") else _DEFAULT_DRAIN_SECONDS
        if not grace >= 0:
            await abort(context, InvalidRequestError(f"grace_seconds must be at least 0, not {grace}"))
        finished, handed_back = await self.drain(grace)
        return worker_pb2.DrainResponse(finished=finished, handed_back=handed_back)

    async def drain(self, grace_seconds: float) -> tuple[int, int]:
        """Stops accepting sequences. After the grace period, hands back those that still run.

        Returns (sequences that ended by themselves, sequences handed back).
        """
        self._draining = True
        self._announce()
        streams = len(self._streams)
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            log.info("handing back %d sequences", len(self._streams))
        handed_back = list(self._streams)
        for name in handed_back:
            error = UnavailableError(f"worker {self._worker_id} is draining; go on with another")
            self._engine.cancel(name, error)
        await self._idle.wait()
        return streams - len(handed_back), len(handed_back)

    def _announce(self) -> None:
        """Sends telemetry to all watchers without waiting for their interval."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _telemetry(self) -> worker_pb2.Telemetry:
        load = self._engine.telemetry()
        return worker_pb2.Telemetry(
            worker_id=self._worker_id,
            model=load.plan.model,
            depth=load.plan.depth,
            running=load.running,
            waiting=load.waiting,
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            steps=load.counters.steps,
            prefill_tokens=load.counters.prefill_tokens,
            generated_tokens=load.counters.generated_tokens,
            finished_sequences=load.counters.finished_sequences,
            preemptions=load.preemptions,
            step_age_seconds=load.step_age,
            draining=self._draining,
            time=time.time(),
            high_exit_tokens=load.counters.high_exit_tokens,
            cached_tokens=load.cached_tokens,
            prompts_read=load.counters.prompts_read,
            prompt_tokens_read=load.counters.prompt_tokens_read,
            prompt_nats=load.counters.prompt_nats,
            confidence_tokens=load.counters.confidence_tokens,
            confidence_nats=load.counters.confidence_nats,
            plans=[
                worker_pb2.PlanLoad(plan=plan_message(plan), running=running)
                for plan, running in load.plans.items()
            ],
            router_number=0 if self._router is None else self._router.number,
        )


async def _write(outbox: Outbox, ends: dict[int, _Ending], context: _Context) -> None:
    """Sends the outputs of a call's sequences. Resolves a sequence's future when its end is sent."""
    while True:
        response = worker_pb2.GenerateManyResponse()
        ended: list[tuple[asyncio.Future[HeliosError | None], HeliosError | None]] = []
        for number, output in await outbox.take():
            # The caller cancelled it.
            if number not in ends:
                continue
            if output.tokens:
                _add_tokens(response.outputs.add(sequence=number).response.chunk, output)
            if output.finish is None and output.error is None:
                continue
            ending, error = ends.pop(number), output.error
            # None if the engine has refused it. Then it has neither finish nor redirect.
            sequence = ending.sequence
            if sequence is not None and output.finish is not None:
                response.outputs.add(sequence=number, response=sequence.finish(output.finish))
            elif sequence is not None and (redirect := sequence.redirect(error)) is not None:
                response.outputs.add(sequence=number, response=redirect)
                error = None
            elif error is not None:
                response.outputs.add(sequence=number, status=status_of(error).SerializeToString())
            ended.append((ending.end, error))
        try:
            if response.outputs:
                await context.write(response)
        except grpc.aio.InternalError:
            # The caller has disconnected; gRPC cancels the call.
            return
        for end, error in ended:
            end.set_result(error)


def _add_tokens(chunk: generation_pb2.Chunk, output: Output) -> None:
    for token in output.tokens:
        chunk.tokens.add(
            index=token.index,
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob,
            confidence=token.confidence,
            exit_layer=token.exit_layer,
            model=token.model,
        )


def _served_prompt(prompt: ServedPrompt) -> worker_pb2.ServedPrompt:
    return worker_pb2.ServedPrompt(
        plan=plan_message(prompt.plan),
        prompt_tokens=prompt.probe.prompt_tokens,
        readings=[
            worker_pb2.ExitReading(
                model=model,
                depth=reading.depth,
                tokens=reading.tokens,
                nats=reading.nats,
                doubt=reading.doubt,
            )
            for model, reading in prompt.probe.readings.items()
        ],
        tokens=prompt.tokens,
        nats=prompt.nats,
        first_ids=prompt.probe.first_ids,
    )


def _resident_bytes() -> int:
    """Resident memory of this process (proc(5), statm)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
