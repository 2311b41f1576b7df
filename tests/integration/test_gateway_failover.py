"""Faults of a worker that a client must notice only as a pause."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from helios.client import AsyncClient, generate_request
from helios.errors import (
    CancelledError,
    EngineFailedError,
    HeliosError,
    InvalidRequestError,
    OverloadedError,
    QuarantinedError,
    SequenceFailedError,
    UnavailableError,
    UnknownModelError,
)
from helios.v1 import inference_pb2, inference_pb2_grpc
from helios.v1.generation_pb2 import SamplingParams
from tests.scripted_worker import (
    Request,
    Response,
    Script,
    chunk,
    finish,
    scripted_workers,
    well_behaved,
)
from tests.stack import Stack
from tests.streams import Streamed, stream, until

SIX = generate_request([2, 7], request_id="six", sampling=SamplingParams(max_tokens=6))
IDS = [100, 101, 102, 103, 104, 105]
BYSTANDERS = 3


async def run(stack: Stack, *scripts: Script, **settings: object) -> tuple[Streamed, list[list[Request]]]:
    """Streams six tokens over workers with these scripts. Also returns the requests that each worker got."""
    async with scripted_workers(*scripts) as workers:
        gateway = stack.start_gateway([worker.address for worker in workers], **settings)
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            whole = await stream(client, SIX)
        assert "Traceback" not in gateway.log
        return whole, [worker.requests for worker in workers]


async def all_ready(client: AsyncClient) -> bool:
    workers = (await client.status()).workers
    return bool(workers) and all(worker.ready for worker in workers)


async def dies_after_three(request: Request, seconds: float) -> AsyncIterator[Response]:
    yield chunk(0, 1, 2)
    raise UnavailableError("gone")


async def hands_back_with_internal(request: Request, seconds: float) -> AsyncIterator[Response]:
    yield chunk(0, 1, 2)
    raise HeliosError("a bug in the worker")


async def ends_without_finish(request: Request, seconds: float) -> AsyncIterator[Response]:
    yield chunk(0, 1, 2)


async def leaves_a_gap(request: Request, seconds: float) -> AsyncIterator[Response]:
    yield chunk(0, 1, 2)
    yield chunk(4, 5)
    yield finish(6)


async def finishes_before_all_came(request: Request, seconds: float) -> AsyncIterator[Response]:
    yield chunk(0, 1, 2)
    yield finish(6)


async def cancels(request: Request, seconds: float) -> AsyncIterator[Response]:
    yield chunk(0, 1, 2)
    raise CancelledError("the worker's own doing")


@pytest.mark.parametrize(
    "script",
    [
        dies_after_three,
        hands_back_with_internal,
        ends_without_finish,
        leaves_a_gap,
        finishes_before_all_came,
        cancels,
    ],
)
async def test_a_stream_goes_on_elsewhere_whatever_the_worker_does(stack: Stack, script: Script) -> None:
    whole, (first, second) = await run(stack, script, well_behaved)
    assert whole.ids == IDS
    assert whole.finish.resumed == 1
    assert [len(first), len(second)] == [1, 1]
    assert list(second[0].prompt_ids) == [2, 7]
    assert list(second[0].emitted_ids) == IDS[:3]
    assert second[0].sampling == first[0].sampling, "the seed that was drawn stays"


async def test_tokens_that_the_client_has_are_not_sent_again(stack: Stack) -> None:
    async def starts_over(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield chunk(0, 1)
        yield chunk(2, 3, 4)
        yield chunk(5)
        yield finish(6)

    whole, _ = await run(stack, dies_after_three, starts_over)
    assert whole.ids == IDS


async def test_a_worker_lost_before_its_finish_costs_only_the_finish(stack: Stack) -> None:
    async def dies_at_the_end(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield chunk(*range(6))
        raise UnavailableError("gone")

    whole, (_, second) = await run(stack, dies_at_the_end, well_behaved)
    assert whole.finish.resumed == 1
    assert list(second[0].emitted_ids) == IDS


async def test_a_full_worker_is_passed_over(stack: Stack) -> None:
    async def full(request: Request, seconds: float) -> AsyncIterator[Response]:
        raise OverloadedError("queue full", 7)
        yield finish(0)

    whole, (refused, taken) = await run(stack, full, well_behaved)
    assert whole.finish.resumed == 0
    assert [len(refused), len(taken)] == [1, 1]

    with pytest.raises(OverloadedError, match="queue full") as caught:
        await run(stack, full, full)
    assert caught.value.retry_after_seconds == 7


async def test_a_stream_under_way_waits_for_a_place_instead_of_ending(stack: Stack) -> None:
    refusals = 0

    async def full_twice(request: Request, seconds: float) -> AsyncIterator[Response]:
        nonlocal refusals
        if refusals < 2:
            refusals += 1
            raise OverloadedError("queue full", 0.05)
        async for response in well_behaved(request, seconds):
            yield response

    async def fails_once(request: Request, seconds: float) -> AsyncIterator[Response]:
        if request.emitted_ids:
            raise OverloadedError("queue full", 0.05)
        async for response in dies_after_three(request, seconds):
            yield response

    whole, _ = await run(stack, fails_once, full_twice)
    assert whole.ids == IDS
    assert whole.finish.resumed == 1
    assert refusals == 2


async def test_what_the_request_caused_is_passed_on_and_not_retried(stack: Stack) -> None:
    async def objects(request: Request, seconds: float) -> AsyncIterator[Response]:
        raise InvalidRequestError("not with this model")
        yield finish(0)

    async with scripted_workers(objects, objects) as workers:
        gateway = stack.start_gateway([worker.address for worker in workers])
        async with AsyncClient(gateway.address) as client:
            with pytest.raises(InvalidRequestError, match="not with this model"):
                await stream(client, SIX)
        assert sum(len(worker.requests) for worker in workers) == 1


async def test_a_stream_that_no_worker_completes_ends_with_the_reason(stack: Stack) -> None:
    async def crashes(request: Request, seconds: float) -> AsyncIterator[Response]:
        raise HeliosError("poisoned")
        yield finish(0)

    async with scripted_workers(crashes, crashes) as workers:
        gateway = stack.start_gateway([worker.address for worker in workers], max_resumes=3)
        async with AsyncClient(gateway.address) as client:
            with pytest.raises(UnavailableError, match="4 workers in a row were lost") as caught:
                await stream(client, SIX)
            assert "Traceback" not in caught.value.message
            assert await all_ready(client), "one stream's fault takes no worker from its neighbours"
        assert sum(len(worker.requests) for worker in workers) == 4


async def kills_at_once(request: Request, seconds: float) -> AsyncIterator[Response]:
    return
    yield finish(0)


async def kills_after_a_token(request: Request, seconds: float) -> AsyncIterator[Response]:
    yield chunk(len(request.emitted_ids))


async def kills_at_the_fourth(request: Request, seconds: float) -> AsyncIterator[Response]:
    for index in range(len(request.emitted_ids), 3):
        yield chunk(index)


async def fails_the_engine(request: Request, seconds: float) -> AsyncIterator[Response]:
    raise EngineFailedError("the engine failed")
    yield finish(0)


@pytest.mark.parametrize(
    "poisoned", [kills_at_once, kills_after_a_token, kills_at_the_fourth, fails_the_engine]
)
async def test_a_request_under_which_two_workers_failed_is_sent_to_no_third(
    stack: Stack, poisoned: Script
) -> None:
    async with scripted_workers(poisoned, poisoned, poisoned) as workers:
        gateway = stack.start_gateway([worker.address for worker in workers])
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            with pytest.raises(QuarantinedError, match="2 workers failed one after the other"):
                await stream(client, SIX)
            await until(lambda: all_ready(client), "the workers to be taken back")
        assert [len(worker.requests) for worker in workers] == [1, 1, 0]


async def test_a_sequence_that_fails_by_itself_is_sent_to_no_other_worker(stack: Stack) -> None:
    async def fails_alone(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield chunk(0)
        raise SequenceFailedError("the sequence failed: ValueError: no text")

    async with scripted_workers(fails_alone, fails_alone) as workers:
        gateway = stack.start_gateway([worker.address for worker in workers])
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            with pytest.raises(SequenceFailedError, match="no text"):
                await stream(client, SIX)
            assert await all_ready(client)
        assert sorted(len(worker.requests) for worker in workers) == [0, 1]


async def test_a_request_that_hangs_two_engines_is_sent_to_no_third(stack: Stack) -> None:
    async def hangs(request: Request, seconds: float) -> AsyncIterator[Response]:
        worker = next(worker for worker in workers if any(request is one for one in worker.requests))
        worker.telemetry.running = 1
        worker.telemetry.step_age_seconds = 9
        await asyncio.Event().wait()
        yield finish(0)

    async with scripted_workers(hangs, hangs, hangs) as workers:
        gateway = stack.start_gateway(
            [worker.address for worker in workers], telemetry_seconds=0.05, engine_timeout_seconds=5
        )
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            with pytest.raises(QuarantinedError, match="its engine hangs"):
                await stream(client, SIX)
        assert [len(worker.requests) for worker in workers] == [1, 1, 0]


async def test_a_stream_outlives_any_number_of_workers_on_which_it_had_settled(stack: Stack) -> None:
    async def two_tokens_and_dies(request: Request, seconds: float) -> AsyncIterator[Response]:
        done = len(request.emitted_ids)
        if done == 6:
            yield finish(6)
            return
        yield chunk(done)
        yield chunk(done + 1)

    whole, _ = await run(stack, two_tokens_and_dies, two_tokens_and_dies)
    assert whole.ids == IDS
    assert whole.finish.resumed == 3


async def test_what_is_handed_back_in_order_is_no_failure(stack: Stack) -> None:
    async def drains(request: Request, seconds: float) -> AsyncIterator[Response]:
        raise UnavailableError("draining; go on with another")
        yield finish(0)

    whole, _ = await run(stack, kills_at_once, drains, drains, well_behaved)
    assert whole.ids == IDS
    assert whole.finish.resumed == 3


def named(name: str) -> "inference_pb2.GenerateRequest":
    return generate_request([2, 7], request_id=name, sampling=SamplingParams(max_tokens=6))


@pytest.mark.parametrize("midway", [False, True])
async def test_only_the_request_that_kills_workers_ends_and_not_those_beside_it(
    stack: Stack, midway: bool
) -> None:
    """midway: the streams beside it have no token yet from the second worker when that worker dies."""
    all_on_the_second, ended = asyncio.Event(), asyncio.Event()

    async def poison(request: Request, on_the_second: bool) -> AsyncIterator[Response]:
        if midway:
            for index in range(len(request.emitted_ids), 3):
                yield chunk(index)
            if on_the_second:
                await all_on_the_second.wait()

    async def script(request: Request, seconds: float) -> AsyncIterator[Response]:
        on_the_second = any(request is one for one in workers[1].requests)
        if len(workers[1].requests) == BYSTANDERS + 1:
            all_on_the_second.set()
        done = len(request.emitted_ids)
        if request.request_id == "poison":
            async for response in poison(request, on_the_second):
                yield response
            return
        if midway and on_the_second:
            await ended.wait()
        for index in range(done, 6):
            if index == done + 2:
                await ended.wait()
            yield chunk(index)
        yield finish(6)

    async with scripted_workers(script, script, script, script) as workers:
        for number, worker in enumerate(workers):
            worker.telemetry.running = 50 * number
        gateway = stack.start_gateway([worker.address for worker in workers])
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            started = asyncio.Semaphore(0)
            beside = [
                asyncio.create_task(
                    stream(client, named(f"beside {number}"), lambda token: started.release())
                )
                for number in range(BYSTANDERS)
            ]
            for _ in range(2 * BYSTANDERS):
                await started.acquire()
            with pytest.raises(QuarantinedError):
                await stream(client, named("poison"))
            ended.set()
            wholes = await asyncio.gather(*beside)
        assert all(whole.ids == IDS for whole in wholes)
        names = [request.request_id for worker in workers for request in worker.requests]
        assert names.count("poison") == (3 if midway else 2)


async def test_progress_resets_the_count_of_losses(stack: Stack) -> None:
    async def one_token_each(request: Request, seconds: float) -> AsyncIterator[Response]:
        done = len(request.emitted_ids)
        if done < 6:
            yield chunk(done)
            raise HeliosError("one token is all")
        yield finish(6)

    whole, _ = await run(stack, one_token_each, max_resumes=1)
    assert whole.ids == IDS
    assert whole.finish.resumed == 6


async def test_a_worker_that_changed_its_model_is_asked_again_under_the_new_one(stack: Stack) -> None:
    async def reloads(request: Request, seconds: float) -> AsyncIterator[Response]:
        if request.model == "tiny":
            workers[0].telemetry.model = "other"
            raise UnknownModelError("model tiny is not served")
        async for response in well_behaved(request, seconds):
            yield response

    async with scripted_workers(reloads) as workers:
        gateway = stack.start_gateway([workers[0].address], telemetry_seconds=0.05)
        async with AsyncClient(gateway.address) as client:
            whole = await stream(client, SIX)
        assert [request.model for request in workers[0].requests] == ["tiny", "other"]
        assert whole.finish.resumed == 0


async def test_streams_leave_a_worker_whose_engine_hangs(stack: Stack) -> None:
    async def hangs(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield chunk(0, 1, 2)
        workers[0].telemetry.running = 1
        workers[0].telemetry.step_age_seconds = 9
        await asyncio.Event().wait()

    async with scripted_workers(hangs, well_behaved) as workers:
        gateway = stack.start_gateway(
            [worker.address for worker in workers], telemetry_seconds=0.05, engine_timeout_seconds=5
        )
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            whole = await stream(client, SIX)
            assert whole.ids == IDS
            assert whole.finish.resumed == 1
            reasons = {worker.worker_id: worker.reason for worker in (await client.status()).workers}
        assert reasons == {"a": "its engine hangs: no step for 9.0 s with 1 sequences", "b": ""}


async def test_a_gateway_that_stood_still_keeps_its_streams_where_they_are(stack: Stack) -> None:
    async def slow(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield chunk(0, 1, 2)
        await asyncio.sleep(4)
        yield chunk(3, 4, 5)
        yield finish(6)

    async with scripted_workers(slow, well_behaved) as (first, second):
        addresses = [first.address, second.address]
        gateway = stack.start_gateway(addresses, telemetry_seconds=0.1, worker_timeout_seconds=1)
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
            running = asyncio.create_task(stream(client, SIX))

            async def begun() -> bool:
                return bool(first.requests)

            await until(begun, "the stream to begin")
            with gateway.frozen():
                await asyncio.sleep(3)
            whole = await running
    assert (whole.ids, whole.finish.resumed, second.requests) == (IDS, 0, [])
    assert "it has sent no telemetry" not in gateway.log


async def test_cancellation_and_deadline_reach_the_worker(stack: Stack) -> None:
    remaining: list[float] = []
    ended = asyncio.Event()

    async def waits(request: Request, seconds: float) -> AsyncIterator[Response]:
        remaining.append(seconds)
        yield chunk(0)
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with scripted_workers(waits) as workers:
        gateway = stack.start_gateway([workers[0].address])
        async with AsyncClient(gateway.address) as client:
            events = client.generate(SIX, timeout_seconds=50)
            await anext(events)
            # gRPC sends a timeout with three digits, rounded up.
            assert 40 < remaining[0] <= 50.1
            await events.aclose()
            await asyncio.wait_for(ended.wait(), 5)


async def test_a_chunk_passes_the_gateway_byte_for_byte(stack: Stack) -> None:
    """Fields that this gateway does not know are passed on."""
    sent = chunk(0).SerializeToString() + b"\xfa\x07\x05later"

    async def from_the_future(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield Response.FromString(sent)
        yield finish(1)

    async with scripted_workers(from_the_future) as workers:
        gateway = stack.start_gateway([workers[0].address])
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            call = channel.unary_stream("/helios.v1.InferenceService/Generate")(SIX.SerializeToString())
            assert await anext(aiter(call)) == sent


async def test_a_client_that_stops_reading_slows_only_itself(stack: Stack) -> None:
    messages, size = 2000, 10_000
    all_sent = asyncio.Event()

    async def torrent(request: Request, seconds: float) -> AsyncIterator[Response]:
        if request.request_id == "six":
            async for response in well_behaved(request, seconds):
                yield response
            return
        for index in range(messages):
            yield chunk(index, text="x" * size)
        all_sent.set()
        yield finish(messages)

    async with scripted_workers(torrent) as workers:
        gateway = stack.start_gateway([workers[0].address])
        # HTTP/2's windows hold only a small part of these 20 MB.
        options = [("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", 64 << 20)]
        async with (
            AsyncClient(gateway.address) as client,
            grpc.aio.insecure_channel(gateway.address, options=options) as channel,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            still = aiter(stub.Generate(inference_pb2.GenerateRequest(text="all of it")))
            responses = [await anext(still)]
            await asyncio.wait_for(all_sent.wait(), 60)
            assert (await stream(client, SIX)).ids == IDS, "a neighbour does not wait"
            responses += [response async for response in still]
    tokens = [token.index for response in responses for token in response.chunk.tokens]
    assert tokens == list(range(messages)), "none is lost"
    assert len(responses) < messages / 2, "what gathered left together"


async def test_a_stream_goes_on_elsewhere_before_its_client_has_read_on(stack: Stack) -> None:
    messages = 500
    taken_over = asyncio.Event()

    async def goes_on(request: Request, seconds: float) -> AsyncIterator[Response]:
        taken_over.set()
        yield finish(messages)

    async with scripted_workers(torrent(messages, HeliosError("gone")), goes_on) as workers:
        gateway = stack.start_gateway([worker.address for worker in workers])
        async with AsyncClient(gateway.address) as client:
            await until(lambda: all_ready(client), "the workers to be ready")
        async with slow_reader(gateway.address) as call:
            received = aiter(call)
            responses = [await anext(received)]
            await asyncio.wait_for(taken_over.wait(), 60)
            responses += [response async for response in received]
        again = workers[1].requests[0].emitted_ids
        assert len(again) == messages, "what was generated is not generated again"
    tokens = [token.index for response in responses for token in response.chunk.tokens]
    assert tokens == list(range(messages)), "none is lost"
    assert responses[-1].finish.resumed == 1


async def test_an_error_comes_after_the_tokens_before_it(stack: Stack) -> None:
    messages = 500
    async with scripted_workers(torrent(messages, InvalidRequestError("at fault"))) as workers:
        gateway = stack.start_gateway([workers[0].address])
        tokens: list[int] = []
        async with slow_reader(gateway.address) as call:
            with pytest.raises(grpc.aio.AioRpcError, match="at fault"):
                async for response in call:
                    tokens += [token.index for token in response.chunk.tokens]
    assert tokens == list(range(messages))


def torrent(messages: int, end: HeliosError) -> Script:
    """Sends more than HTTP/2's windows hold (10 kB per token), and then an error."""

    async def script(request: Request, seconds: float) -> AsyncIterator[Response]:
        for index in range(messages):
            yield chunk(index, text="x" * 10_000)
        raise end

    return script


@asynccontextmanager
async def slow_reader(
    address: str,
) -> AsyncIterator["grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]"]:
    """Opens a stream whose HTTP/2 windows do not grow."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        yield stub.Generate(inference_pb2.GenerateRequest(text="all of it"))
