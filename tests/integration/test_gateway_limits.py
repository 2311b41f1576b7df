"""An overloaded or stopping gateway refuses at once, and no client slows another."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from helios.client import AsyncClient, generate_request
from helios.errors import DeadlineExceededError, InvalidRequestError, OverloadedError, UnavailableError
from helios.v1 import inference_pb2_grpc
from helios.v1.generation_pb2 import SamplingParams
from tests.stack import STOP_SECONDS, Process, Stack
from tests.streams import all_free, stream, until

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
LONG = SamplingParams(max_tokens=1900, ignore_eos=True)
# With these settings, a worker that a test froze does not count as lost.
PATIENT = {"worker_timeout_seconds": 600, "engine_timeout_seconds": 600}


async def test_a_full_queue_refuses_with_a_retry_hint_and_serves_again_later(stack: Stack) -> None:
    worker = stack.start_worker(model="long", max_running=1)
    gateway = stack.start_gateway([worker.address], max_queued_streams=1, **PATIENT)
    async with AsyncClient(gateway.address) as client:
        running = client.generate(generate_request("a", sampling=LONG))
        await anext(running)
        with worker.frozen():
            queued = asyncio.create_task(stream(client, generate_request("b", sampling=SHORT)))

            async def waits() -> bool:
                return (await client.status()).queued_streams == 1

            await until(waits, "the second stream to wait")
            with pytest.raises(OverloadedError, match="wait for their first token") as refused:
                await stream(client, generate_request("c", sampling=SHORT))
            assert 0 < refused.value.retry_after_seconds <= 30
            status = await asyncio.to_thread(_refusal, gateway.address)
            await running.aclose()
        await queued
        await stream(client, generate_request("c", sampling=SHORT))

    assert status.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(status.trailing_metadata())
    assert int(metadata["retry-after-ms"]) > 0
    rich = rpc_status.from_call(status)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rich.details)
    assert retry.retry_delay.ToMilliseconds() == int(metadata["retry-after-ms"])


def _refusal(address: str) -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(generate_request("c", sampling=SHORT)))
        return caught.value


async def test_a_request_beyond_what_grpc_takes_is_not_one_to_try_again(
    stack: Stack, long_worker: Process
) -> None:
    gateway = stack.start_gateway([long_worker.address], max_request_bytes=2000)
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(InvalidRequestError, match="larger than"):
            await stream(client, generate_request("a" * 3000, sampling=SHORT))
        await stream(client, generate_request("a", sampling=SHORT))


async def test_open_streams_are_bounded(stack: Stack, long_worker: Process) -> None:
    gateway = stack.start_gateway([long_worker.address], max_open_streams=2, **PATIENT)
    async with AsyncClient(gateway.address) as client:
        with long_worker.frozen():
            first, second = (
                asyncio.create_task(stream(client, generate_request("a", sampling=LONG))) for _ in range(2)
            )

            async def open_streams(count: int) -> bool:
                return (await client.status()).open_streams == count

            await until(lambda: open_streams(2), "both streams to be open")
            with pytest.raises(OverloadedError, match="2 streams are open"):
                await stream(client, generate_request("c", sampling=SHORT))
            first.cancel()
            await until(lambda: open_streams(1), "the cancelled stream to leave")
            third = asyncio.create_task(stream(client, generate_request("c", sampling=SHORT)))
            await until(lambda: open_streams(2), "another to take its place")
        await asyncio.gather(second, third)


@pytest.mark.parametrize(
    ("deadline", "limit", "message"),
    [(0.4, 60, "eadline"), (None, 0.4, r"longer than 0\.4 s, this gateway's limit")],
)
async def test_a_stream_that_takes_too_long_ends_and_frees_its_kv_blocks(
    stack: Stack, long_worker: Process, deadline: float | None, limit: float, message: str
) -> None:
    gateway = stack.start_gateway([long_worker.address], max_request_seconds=limit, **PATIENT)
    async with AsyncClient(gateway.address) as client:

        async def ready() -> bool:
            return all(worker.ready for worker in (await client.status()).workers)

        await until(ready, "the worker to be ready")
        try:
            with pytest.raises(DeadlineExceededError, match=message):
                async for _ in client.generate(generate_request("a", sampling=LONG), deadline):
                    # Its sequence holds blocks and does not end before the deadline.
                    long_worker.suspend()
        finally:
            long_worker.resume()
        await until(lambda: all_free(client), "the expired stream's KV blocks to be free")


async def test_without_a_worker_the_gateway_says_what_it_waits_for(stack: Stack) -> None:
    gateway = stack.start_gateway(["127.0.0.1:1"], worker_wait_seconds=0.3)
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(UnavailableError, match=r"waited 0\.3 s .* 127\.0\.0\.1:1: it cannot be reached"):
            await stream(client, generate_request("a"))
        assert any("no worker is ready" in problem for problem in (await client.status()).problems)


async def test_without_any_way_to_find_workers_the_gateway_says_so(stack: Stack) -> None:
    gateway = stack.start_gateway(worker_wait_seconds=0.1)
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(UnavailableError, match="neither a Redis URL nor a list of workers"):
            await stream(client, generate_request("a"))


async def test_the_reason_fits_a_status_however_many_workers_are_away(stack: Stack) -> None:
    away = [f"127.0.0.1:{port}" for port in range(1, 200)]
    gateway = stack.start_gateway(away, worker_wait_seconds=0.1)
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(UnavailableError, match="and 194 more"):
            await stream(client, generate_request("a"))


async def test_sigterm_lets_open_streams_end_and_refuses_new_ones(stack: Stack, long_worker: Process) -> None:
    gateway = stack.start_gateway([long_worker.address], grace_seconds=600, **PATIENT)
    async with (
        AsyncClient(gateway.address) as client,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        request = generate_request("a", sampling=LONG)
        alone = await stream(client, request)
        started = asyncio.Event()
        running = asyncio.create_task(stream(client, request, on_token=lambda token: started.set()))
        await started.wait()
        with long_worker.frozen():
            gateway.process.terminate()
            stub = health_pb2_grpc.HealthStub(channel)

            async def not_serving() -> bool:
                return (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING

            await until(not_serving, "the health service to say so")
            with pytest.raises(UnavailableError, match="this gateway is stopping"):
                await stream(client, generate_request("b", sampling=SHORT))
        assert (await running).said == alone.said
    assert await asyncio.to_thread(gateway.process.wait, STOP_SECONDS) == 0


async def test_streams_beyond_the_grace_end_with_unavailable(stack: Stack, long_worker: Process) -> None:
    gateway = stack.start_gateway([long_worker.address], grace_seconds=0, **PATIENT)
    async with AsyncClient(gateway.address) as client:
        events = client.generate(generate_request("a", sampling=LONG))
        await anext(events)
        with long_worker.frozen():
            gateway.process.terminate()
            with pytest.raises(UnavailableError, match="gateway stopped before the stream ended"):
                async for _ in events:
                    pass
    assert await asyncio.to_thread(gateway.process.wait, STOP_SECONDS) == 0


async def test_a_client_that_stops_reading_slows_no_other(stack: Stack, long_worker: Process) -> None:
    gateway = stack.start_gateway([long_worker.address])
    request = generate_request("a", sampling=SamplingParams(max_tokens=500, ignore_eos=True))
    # The receive window holds a few messages, so that the gateway notices that this client does not read.
    window = [("grpc.http2.lookahead_bytes", 256), ("grpc.http2.bdp_probe", 0)]
    async with (
        AsyncClient(gateway.address) as client,
        grpc.aio.insecure_channel(gateway.address, options=window) as channel,
    ):
        alone = await stream(client, request)
        still = aiter(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
        responses = [await anext(still)]
        neighbours = await asyncio.gather(*(stream(client, request) for _ in range(3)))
        responses += [response async for response in still]
    assert all(neighbour.said == alone.said for neighbour in neighbours)
    tokens = [token for response in responses for token in response.chunk.tokens]
    assert [token.token_id for token in tokens] == alone.ids
    assert responses[-1].finish.text == alone.text
