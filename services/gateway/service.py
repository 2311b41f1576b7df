"""helios.v1.InferenceService over the worker pool."""

import asyncio
import logging
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from helios import telemetry
from helios.errors import DeadlineExceededError, HeliosError, InvalidRequestError, UnavailableError
from helios.routing.preference import Preference
from helios.sampling import SamplingParams
from helios.server import abort
from helios.v1 import generation_pb2, inference_pb2
from services.gateway.admission import Admission
from services.gateway.chat_templates import ChatTemplates
from services.gateway.metrics import StreamMetrics
from services.gateway.prompt import read_prompt
from services.gateway.prompt_sampler import PromptSampler
from services.gateway.response_writer import ResponseWriter
from services.gateway.settings import GatewaySettings
from services.gateway.stream import Stream
from services.gateway.tokenizer_cache import TokenizerCache
from services.gateway.validation import check_request, parse, sampling_params
from services.gateway.worker_pool import WorkerPool

log = logging.getLogger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


class InferenceService:
    """Serves clients. Requests and responses are raw bytes.

    So a request that cannot be parsed gets one of Helios's own statuses, and a worker's chunk is passed on
    unchanged.
    """

    def __init__(self, settings: GatewaySettings, pool: WorkerPool, sampler: PromptSampler) -> None:
        self._settings = settings
        self._pool = pool
        self._sampler = sampler
        self._admission = Admission(settings)
        self._metrics = StreamMetrics(self._admission)
        self._tokenizers = TokenizerCache(settings.worker_timeout_seconds)
        self._templates = ChatTemplates(settings.worker_timeout_seconds)
        # The deadlines of the open streams.
        self._deadlines: set[asyncio.Timeout] = set()
        self._stream_ended = asyncio.Event()
        self._stopping = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service's methods without the (de)serialisers of the generated code."""
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(self.generate),
            "GetServingStatus": grpc.unary_unary_rpc_method_handler(self.get_serving_status),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new streams and waits for the open ones. After the grace period, ends those that remain."""
        self._stopping = True
        latest = asyncio.get_running_loop().time() + grace_seconds
        for timeout in self._deadlines:
            if not timeout.expired():
                timeout.reschedule(min(timeout.when() or latest, latest))
        while self._deadlines:
            self._stream_ended.clear()
            await self._stream_ended.wait()
        self._templates.close()

    async def generate(self, raw: bytes, context: Context) -> None:
        """Serves one stream. Every failure becomes a status with a reason, which the span gets too."""
        parent = telemetry.extract(context.invocation_metadata())
        status = grpc.StatusCode.CANCELLED
        try:
            with telemetry.span("Generate", parent, SpanKind.SERVER) as span:
                error = await self._generate(raw, context, span)
                if error is not None:
                    span.set_status(Status(StatusCode.ERROR, error.message))
            status = grpc.StatusCode.OK if error is None else error.code
        finally:
            self._metrics.ended(status.name)
        if error is not None:
            await abort(context, error)

    async def get_serving_status(self, raw: bytes, context: Context) -> bytes:
        """The workers, the load and the limits as this gateway sees them."""
        try:
            inference_pb2.GetServingStatusRequest.FromString(raw)
        except DecodeError:
            error = InvalidRequestError("the message is not a valid helios.v1.GetServingStatusRequest")
            await abort(context, error)
        settings = self._settings
        return inference_pb2.GetServingStatusResponse(
            workers=[worker.state() for worker in self._pool.workers],
            open_streams=self._admission.open_streams,
            queued_streams=self._admission.queued_streams,
            limits=inference_pb2.Limits(
                max_prompt_tokens=settings.max_prompt_tokens,
                max_tokens=settings.max_tokens,
                max_open_streams=settings.max_open_streams,
                max_queued_streams=settings.max_queued_streams,
                max_request_seconds=settings.max_request_seconds,
            ),
            problems=[*self._pool.problems(), *self._sampler.problems()],
        ).SerializeToString()

    async def _generate(self, raw: bytes, context: Context, span: Span) -> HeliosError | None:
        """Serves the stream. Returns the error to answer with, if any."""
        request_id = ""
        try:
            request = parse(raw)
            request_id = request.request_id or str(uuid.uuid4())
            span.set_attribute("helios.request_id", request_id)
            check_request(request, self._settings)
            preference = Preference.from_proto(request)
            sampling = sampling_params(request, self._settings, default_seed=secrets.randbits(64))
            finish = await self._serve(request, request_id, sampling, preference, context, span)
        except HeliosError as error:
            log.info("stream %s ended with %s: %s", request_id, error.code.name, error.message)
            return error
        except asyncio.CancelledError:
            log.info("stream %s ended by its client", request_id)
            span.set_status(Status(StatusCode.ERROR, "ended by the client"))
            raise
        except grpc.aio.InternalError:
            # The client disconnected during a write; gRPC ends the call.
            log.info("stream %s: its client is gone", request_id)
            raise
        except Exception:
            log.exception("stream %s failed", request_id)
            return HeliosError(f"the gateway failed on request {request_id}; its log has the cause")
        reason = generation_pb2.FinishReason.Name(finish.reason)
        span.set_attribute("helios.finish_reason", reason)
        self._metrics.finished(finish)
        if finish.depth:
            span.set_attribute("helios.depth", finish.depth)
        if finish.HasField("expected_perplexity_increase"):
            increase = finish.expected_perplexity_increase
            span.set_attribute("helios.expected_perplexity_increase", increase)
            span.set_attribute("helios.plan_reason", finish.plan_reason)
        log.info(
            "stream %s ended: %s",
            request_id,
            reason,
            extra={
                "completion_tokens": finish.completion_tokens,
                "resumed": finish.resumed,
                "model": finish.model,
                "depth": finish.depth,
            },
        )
        return None

    async def _serve(
        self,
        request: inference_pb2.GenerateRequest,
        request_id: str,
        sampling: SamplingParams,
        preference: Preference,
        context: Context,
        span: Span,
    ) -> generation_pb2.Finish:
        """Admits the stream and runs it until its deadline."""
        if self._stopping:
            raise UnavailableError("this gateway is stopping; retry with another")
        limit = self._settings.max_request_seconds
        remaining: float | None = context.time_remaining()
        seconds = limit if remaining is None else min(limit, remaining)
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            with self._admission.admit() as place:
                async with asyncio.timeout_at(deadline) as timeout:
                    self._deadlines.add(timeout)
                    try:
                        prompt = await read_prompt(
                            request,
                            sampling.max_tokens,
                            self._pool,
                            self._tokenizers,
                            self._templates,
                            self._settings,
                        )
                        self._sampler.offer(prompt.tokenizer_id, prompt.ids)
                        sampling = prompt.fitted(sampling)
                        span.set_attribute("helios.prompt_tokens", len(prompt.ids))
                        stream = Stream(
                            self._pool,
                            self._settings,
                            request_id=request_id,
                            prompt_ids=prompt.ids,
                            sampling=sampling,
                            preference=preference,
                            needs=prompt.needs(sampling),
                            dropped_messages=prompt.dropped_messages,
                            write=ResponseWriter(context).write,
                            on_first_token=place.first_token,
                        )
                        try:
                            with _described(span, stream):
                                return await stream.run(deadline)
                        finally:
                            self._metrics.moved(stream.resumed, stream.redirected)
                    finally:
                        self._deadlines.discard(timeout)
                        self._stream_ended.set()
        except TimeoutError:
            if self._stopping:
                raise UnavailableError(
                    "this gateway stopped before the stream ended; retry with another"
                ) from None
            whose = "its deadline" if seconds < limit else "this gateway's limit"
            raise DeadlineExceededError(f"the request took longer than {seconds:.3g} s, {whose}") from None


@contextmanager
def _described(span: Span, stream: Stream) -> Iterator[None]:
    """Records in the span how far the stream got, however it ends."""
    try:
        yield
    finally:
        span.set_attributes(
            {
                "helios.completion_tokens": len(stream.emitted_ids),
                "helios.resumed": stream.resumed,
                "helios.redirected": stream.redirected,
                "helios.model": stream.model,
            }
        )
