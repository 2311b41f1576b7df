"""A load generator. Each client keeps one stream open and records when tokens arrive."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import grpc

from bench.load.latency import Latency, latency
from helios.channel import to_service_async
from helios.errors import HeliosError
from helios.v1 import generation_pb2, inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc

_Response = inference_pb2.GenerateResponse | worker_pb2.WorkerServiceGenerateResponse


@dataclass(frozen=True, slots=True)
class Request:
    """One greedy request that always generates `max_tokens` tokens."""

    prompt_ids: tuple[int, ...]
    max_tokens: int

    def sampling(self) -> generation_pb2.SamplingParams:
        """The sampling parameters of the protos."""
        return generation_pb2.SamplingParams(max_tokens=self.max_tokens, seed=0, ignore_eos=True)


@dataclass(slots=True)
class Stream:
    """The tokens that one request received. Times are seconds of the monotonic clock."""

    request: Request
    opened: float
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    messages: int = 0
    resumed: int = 0
    error: str = ""
    # How many of the tokens each (model, exit layer) generated.
    exits: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.token_times[0] - self.opened

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run."""

    streams: int
    failed: int
    tokens: int
    messages: int
    seconds: float
    tokens_per_second: float
    ttft_ms: Latency
    tpot_ms: Latency


Open = Callable[[int, Request], AsyncIterator[_Response]]


def through_gateway(channel: grpc.aio.Channel) -> Open:
    """Opens streams through the gateway to which the channel leads."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)

    def open_stream(index: int, request: Request) -> AsyncIterator[_Response]:
        message = inference_pb2.GenerateRequest(
            request_id=f"bench-{index}",
            token_ids=generation_pb2.TokenIds(ids=request.prompt_ids),
            sampling=request.sampling(),
        )
        return aiter(stub.Generate(message))

    return open_stream


def straight_to_workers(channels: Sequence[grpc.aio.Channel]) -> Open:
    """Opens the same streams without a gateway. The workers take turns."""
    stubs = [worker_pb2_grpc.WorkerServiceStub(channel) for channel in channels]

    def open_stream(index: int, request: Request) -> AsyncIterator[_Response]:
        message = worker_pb2.WorkerServiceGenerateRequest(
            request_id=f"bench-{index}", prompt_ids=request.prompt_ids, sampling=request.sampling()
        )
        return aiter(stubs[index % len(stubs)].Generate(message))

    return open_stream


def connect(address: str) -> grpc.aio.Channel:
    """A channel with its own connection, for the running event loop."""
    return to_service_async(address, [("grpc.use_local_subchannel_pool", 1)])


async def run(open_stream: Open, requests: Iterable[Request], concurrency: int) -> list[Stream]:
    """Serves all requests with `concurrency` clients. Each opens its next stream when the last one has ended.

    A failed stream raises nothing. It is returned with its error.
    """
    pending = iter(enumerate(requests))
    streams: list[Stream] = []

    async def client() -> None:
        for index, request in pending:
            streams.append(await consume(open_stream, index, request))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return streams


async def consume(open_stream: Open, index: int, request: Request) -> Stream:
    """Reads one stream to its end. Errors are not raised, but stored in the stream."""
    stream = Stream(request, opened=time.monotonic())
    try:
        async for response in open_stream(index, request):
            stream.messages += 1
            if response.HasField("chunk"):
                stream.token_ids += [token.token_id for token in response.chunk.tokens]
                stream.token_times += [time.monotonic()] * len(response.chunk.tokens)
                stream.exits.update((token.model, token.exit_layer) for token in response.chunk.tokens)
            else:
                stream.resumed = response.finish.resumed
    except grpc.aio.AioRpcError as error:
        stream.error = f"{error.code().name}: {error.details()}"
    except HeliosError as error:
        stream.error = str(error)
    return stream


def summarise(streams: Sequence[Stream]) -> Summary:
    """The figures of a run. Throughput is over the time from the first opened stream to the last token."""
    whole = [stream for stream in streams if not stream.error and len(stream.token_ids) > 1]
    tokens = sum(len(stream.token_ids) for stream in streams)
    ends = [stream.token_times[-1] for stream in streams if stream.token_times]
    seconds = max(ends) - min(stream.opened for stream in streams) if ends else 0.0
    return Summary(
        streams=len(streams),
        failed=sum(bool(stream.error) for stream in streams),
        tokens=tokens,
        messages=sum(stream.messages for stream in streams),
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        ttft_ms=latency([stream.ttft for stream in whole]),
        tpot_ms=latency([stream.tpot for stream in whole]),
    )
