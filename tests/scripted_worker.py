"""A worker on a real socket whose answers the test decides. It can have faults that no real worker has."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeAlias

import grpc

from helios.errors import HeliosError, status_of
from helios.served import ServedPlan
from helios.v1 import generation_pb2, worker_pb2, worker_pb2_grpc
from tests.stack import VOCAB_SIZE, write_tokenizer

Request: TypeAlias = worker_pb2.WorkerServiceGenerateRequest
Response: TypeAlias = worker_pb2.WorkerServiceGenerateResponse
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# Sequences that a worker runs at once.
PLACES = 64
# Takes a request and the seconds until its deadline. If it raises a HeliosError, the sequence ends with it.
Script: TypeAlias = Callable[[Request, float], AsyncIterator[Response]]


class _EndOfCallError(Exception):
    """A script raises this to end its call."""


class ScriptedWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Answers each sequence by its script and keeps the requests. It reports `telemetry`."""

    def __init__(self, worker_id: str, script: Script, model: str = "tiny") -> None:
        self.script = script
        self.requests: list[Request] = []
        self.address = ""
        # While it is quiet, it sends no telemetry, but keeps its connections.
        self.is_quiet = False
        self.telemetry = worker_pb2.Telemetry(
            worker_id=worker_id, model=model, depth=4, blocks_total=100, blocks_free=100
        )
        # By model, its chat template.
        self.chat_templates: dict[str, str] = {}
        # Names of the models that it could load.
        self.loadable: list[str] = []
        self._tokenizer_json = write_tokenizer().encode()

    def serve(self, *plans: ServedPlan, router_number: int = 1) -> None:
        """From its next telemetry on, these plans are in force, and it has a router."""
        self.telemetry.model, self.telemetry.depth = plans[0].model, plans[0].depth
        self.telemetry.ClearField("plans")
        for plan in plans:
            self.telemetry.plans.add(plan=worker_pb2.Plan(model=plan.model, depth=plan.depth))
        self.telemetry.router_number = router_number

    async def GenerateMany(  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.GenerateManyRequest], context: Context
    ) -> None:
        running: dict[int, asyncio.Task[None]] = {}
        sending = asyncio.Lock()
        try:
            async with asyncio.TaskGroup() as group:
                async for request in request_iterator:
                    if request.HasField("start"):
                        task = group.create_task(self._run(request.start, context, sending))
                        running[request.start.sequence] = task
                    else:
                        running[request.cancel].cancel()
        except* _EndOfCallError:
            pass

    async def _run(self, start: worker_pb2.SequenceStart, context: Context, sending: asyncio.Lock) -> None:
        """Sends the responses of the script. If it ends without a finish or an error, the call ends."""
        self.requests.append(start.request)

        async def send(**event: Any) -> None:
            output = worker_pb2.SequenceOutput(sequence=start.sequence, **event)
            async with sending:
                await context.write(worker_pb2.GenerateManyResponse(outputs=[output]))

        try:
            async for response in self.script(start.request, start.timeout_seconds):
                await send(response=response)
                if not response.HasField("chunk"):
                    return
        except HeliosError as error:
            await send(status=status_of(error).SerializeToString())
        else:
            raise _EndOfCallError

    async def WatchTelemetry(  # noqa: N802
        self, request: worker_pb2.WatchTelemetryRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchTelemetryResponse]:
        while True:
            self.telemetry.time = time.time()
            if not self.is_quiet:
                yield worker_pb2.WatchTelemetryResponse(telemetry=self.telemetry)
            await asyncio.sleep(request.interval_seconds)

    async def GetStatus(  # noqa: N802
        self, request: worker_pb2.GetStatusRequest, context: Context
    ) -> worker_pb2.GetStatusResponse:
        model = worker_pb2.ModelInfo(
            name=self.telemetry.model,
            depth=self.telemetry.depth,
            vocab_size=VOCAB_SIZE,
            context_tokens=256,
            tokenizer_id="scripted",
        )
        return worker_pb2.GetStatusResponse(
            telemetry=self.telemetry,
            model=model,
            max_running=PLACES,
            models=self.loadable,
            chat_template_ids=self.chat_templates,
        )

    async def GetChatTemplate(  # noqa: N802
        self, request: worker_pb2.GetChatTemplateRequest, context: Context
    ) -> worker_pb2.GetChatTemplateResponse:
        template = self.chat_templates[request.model]
        return worker_pb2.GetChatTemplateResponse(chat_template_id=template, template=template, source="x")

    async def GetTokenizer(  # noqa: N802
        self, request: worker_pb2.GetTokenizerRequest, context: Context
    ) -> worker_pb2.GetTokenizerResponse:
        return worker_pb2.GetTokenizerResponse(tokenizer_id="scripted", tokenizer_json=self._tokenizer_json)


@asynccontextmanager
async def scripted_workers(*scripts: Script) -> AsyncIterator[list[ScriptedWorker]]:
    """Serving workers `a`, `b`, ... Each has more load than the one before, so streams try `a` first."""
    async with AsyncExitStack() as stack:
        workers = []
        for load, script in enumerate(scripts):
            worker = ScriptedWorker("abcdef"[load], script)
            worker.telemetry.running = load
            server = grpc.aio.server()
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
            worker.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
            workers.append(worker)
        yield workers


def chunk(*indices: int, text: str = "x") -> Response:
    """A chunk of tokens with these indices. The id of a token is 100 + its index."""
    return Response(
        chunk=generation_pb2.Chunk(
            tokens=[
                generation_pb2.Token(index=index, token_id=100 + index, text=text, model="tiny")
                for index in indices
            ]
        )
    )


def finish(tokens: int, text: str = "x") -> Response:
    """The end of a stream with this many tokens."""
    return Response(
        finish=generation_pb2.Finish(
            reason=generation_pb2.FINISH_REASON_LENGTH, text=text * tokens, completion_tokens=tokens
        )
    )


def redirect(*plans: tuple[ServedPlan, float]) -> Response:
    """The end of a stream that may be served under these plans: each with its extra seconds per token.

    The expected rise of perplexity is a hundredth of the plan's depth.
    """
    return Response(
        redirect=worker_pb2.Redirect(
            plans=[
                worker_pb2.RankedPlan(
                    plan=worker_pb2.Plan(model=plan.model, depth=plan.depth),
                    extra_seconds_per_token=seconds,
                    expected_perplexity_increase=plan.depth / 100,
                    reason=f"{plan} was ranked",
                )
                for plan, seconds in plans
            ]
        )
    )


async def well_behaved(request: Request, seconds: float) -> AsyncIterator[Response]:
    """Continues after the emitted tokens, up to max_tokens."""
    for index in range(len(request.emitted_ids), request.sampling.max_tokens):
        yield chunk(index)
    yield finish(request.sampling.max_tokens)


async def endless(request: Request, seconds: float) -> AsyncIterator[Response]:
    """One token, and then nothing until the call is cancelled."""
    yield chunk(0)
    await asyncio.Event().wait()
