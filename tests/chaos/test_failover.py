"""A stream outlives its worker: killed, frozen, hung or drained, the client sees a pause and nothing else."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from helios.client import AsyncClient, generate_request
from helios.v1 import generation_pb2, inference_pb2, worker_pb2, worker_pb2_grpc
from helios.v1.generation_pb2 import SamplingParams
from tests.stack import Process, Stack, write_model, write_tokenizer
from tests.streams import Streamed, all_free, stream, until

pytestmark = pytest.mark.chaos

STREAMS = 40
TOKENS = 150
# So late in the run that both workers have open streams, and so early that the end is far.
MIDWAY = STREAMS * TOKENS // 10
# The places in a worker's batch, and a large model: a step takes much longer than gateway and client need for
# its tokens. So at midway the workers have most of the run before them, however slowly the client reads.
# Streams of a tiny model would end before the client sees them, and a lost worker might have no open stream.
PLACES = 4
MODEL, LAYERS, HIDDEN = "heavy", 8, 256
PROMPTS = (
    "def main(",
    "class Parser",
    "Return the",
    "import",
    "if value is None:",
    "raise Error",
    "self.",
    "#",
)


@pytest.fixture(scope="module")
def heavy_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("heavy-models")
    write_model(models / MODEL, write_tokenizer(), layers=LAYERS, hidden=HIDDEN)
    return models


@pytest.fixture
def stack(tmp_path: Path, heavy_models: Path) -> Iterator[Stack]:
    parts = Stack(tmp_path, heavy_models)
    yield parts
    parts.close()


def start_worker(stack: Stack, **settings: object) -> Process:
    return stack.start_worker(MODEL, LAYERS, max_running=PLACES, **settings)


def requests() -> list[inference_pb2.GenerateRequest]:
    """Requests: one half greedy, the other half sampled, each with its own seed."""
    return [
        generate_request(
            f"{PROMPTS[number % len(PROMPTS)]} {number}",
            sampling=SamplingParams(
                max_tokens=TOKENS,
                ignore_eos=True,
                temperature=0.8 if number % 2 else 0,
                top_p=0.9 if number % 2 else 1,
                seed=number,
            ),
        )
        for number in range(STREAMS)
    ]


async def run_all(client: AsyncClient, at_midway: Callable[[], object] = lambda: None) -> Sequence[Streamed]:
    """Runs all streams at once. Calls `at_midway` when a tenth of the tokens have come."""
    seen = 0

    def count(token: generation_pb2.Token) -> None:
        nonlocal seen
        seen += 1
        if seen == MIDWAY:
            at_midway()

    return await asyncio.gather(*(stream(client, request, count) for request in requests()))


def assert_undisturbed(disturbed: Sequence[Streamed], undisturbed: Sequence[Streamed]) -> None:
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert one.said == other.said
        assert one.finish.text == other.finish.text
    assert sum(one.finish.resumed for one in undisturbed) == 0
    assert sum(one.finish.resumed for one in disturbed) > 0


async def test_forty_streams_equal_their_undisturbed_run_when_a_worker_is_killed(stack: Stack) -> None:
    stack.start_redis()
    workers = [start_worker(stack) for _ in range(2)]
    gateway = stack.start_gateway()
    async with AsyncClient(gateway.address) as client:
        await until(lambda: ready(client, 2), "both workers to be ready")
        undisturbed = await run_all(client)
        disturbed = await run_all(client, at_midway=workers[0].process.kill)
        assert_undisturbed(disturbed, undisturbed)
        await until(lambda: known(client, 1), "the killed worker to be forgotten")


async def test_in_int8_a_killed_workers_streams_go_on_to_the_bit(stack: Stack) -> None:
    """In other precisions the last digits of a logprob depend on the batch. In int8 no digit does."""
    workers = [start_worker(stack, precision="int8") for _ in range(2)]
    gateway = stack.start_gateway([worker.address for worker in workers])
    async with AsyncClient(gateway.address) as client:
        await until(lambda: ready(client, 2), "both workers to be ready")
        undisturbed = await run_all(client)
        disturbed = await run_all(client, at_midway=workers[0].process.kill)
        assert_undisturbed(disturbed, undisturbed)
        for one, other in zip(disturbed, undisturbed, strict=True):
            assert one.tokens == other.tokens


async def test_streams_go_on_when_a_worker_freezes(stack: Stack) -> None:
    workers = [start_worker(stack) for _ in range(2)]
    gateway = stack.start_gateway([worker.address for worker in workers])
    async with AsyncClient(gateway.address) as client:
        await until(lambda: ready(client, 2), "both workers to be ready")
        undisturbed = await run_all(client)
        disturbed = await run_all(client, at_midway=workers[0].suspend)
        assert_undisturbed(disturbed, undisturbed)
        assert await reasons(client) == ["it has sent no telemetry for 3 s", ""]

        workers[0].resume()
        await until(lambda: ready(client, 2), "the worker to be taken back when it wakes")
        await until(lambda: all_free(client), "the KV blocks of the streams that left to be free")


async def test_streams_go_on_when_a_worker_drains(stack: Stack) -> None:
    workers = [start_worker(stack) for _ in range(2)]
    gateway = stack.start_gateway([worker.address for worker in workers])
    async with (
        AsyncClient(gateway.address) as client,
        grpc.aio.insecure_channel(workers[0].address) as channel,
    ):
        await until(lambda: ready(client, 2), "both workers to be ready")
        undisturbed = await run_all(client)
        await channel.channel_ready()
        drains: list[asyncio.Future[worker_pb2.DrainResponse]] = []
        stub = worker_pb2_grpc.WorkerServiceStub(channel)

        async def drain() -> worker_pb2.DrainResponse:
            return await stub.Drain(worker_pb2.DrainRequest(grace_seconds=0))

        disturbed = await run_all(client, lambda: drains.append(asyncio.ensure_future(drain())))
        assert_undisturbed(disturbed, undisturbed)
        assert (await drains[0]).handed_back > 0

        async def told() -> bool:
            return await reasons(client) == ["it is draining", ""]

        await until(told, "the worker to be known as draining")


async def test_streams_go_on_when_a_worker_is_stopped_with_sigterm(stack: Stack) -> None:
    workers = [start_worker(stack, drain_seconds=0) for _ in range(2)]
    gateway = stack.start_gateway([worker.address for worker in workers])
    async with AsyncClient(gateway.address) as client:
        await until(lambda: ready(client, 2), "both workers to be ready")
        undisturbed = await run_all(client)
        disturbed = await run_all(client, at_midway=workers[0].process.terminate)
        assert_undisturbed(disturbed, undisturbed)


async def test_streams_wait_for_the_only_worker_to_return(stack: Stack) -> None:
    worker = start_worker(stack)
    gateway = stack.start_gateway([worker.address], worker_wait_seconds=120)
    async with AsyncClient(gateway.address) as client:
        undisturbed = await run_all(client)
        running = asyncio.create_task(run_all(client, at_midway=worker.process.kill))
        await asyncio.to_thread(worker.process.wait)
        await asyncio.to_thread(start_worker, stack, address=worker.address)
        assert_undisturbed(await running, undisturbed)


async def test_streams_and_new_requests_go_on_while_redis_is_down(stack: Stack) -> None:
    redis = stack.start_redis()
    for _ in range(2):
        start_worker(stack)
    gateway = stack.start_gateway(discovery_seconds=0.1)
    async with AsyncClient(gateway.address) as client:
        await until(lambda: ready(client, 2), "both workers to be ready")
        undisturbed = await run_all(client)
        through_the_loss = await run_all(client, at_midway=redis.kill)

        async def noticed() -> bool:
            return any("Redis" in problem for problem in (await client.status()).problems)

        await until(noticed, "the status to say that Redis is away")
        assert await ready(client, 2)
        without_redis = await run_all(client)
    for one, two, three in zip(undisturbed, through_the_loss, without_redis, strict=True):
        assert one.said == two.said == three.said
        assert two.finish.resumed == three.finish.resumed == 0


async def ready(client: AsyncClient, count: int) -> bool:
    """Whether exactly this many workers are ready."""
    return sum(worker.ready for worker in (await client.status()).workers) == count


async def reasons(client: AsyncClient) -> list[str]:
    """The reason why each worker is not ready. It is empty for a ready worker."""
    return [worker.reason for worker in (await client.status()).workers]


async def known(client: AsyncClient, count: int) -> bool:
    """Whether the gateway knows exactly this many workers."""
    return len((await client.status()).workers) == count
