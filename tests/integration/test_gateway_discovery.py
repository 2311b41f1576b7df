"""How a gateway finds workers and forgets them."""

import asyncio
import json
from pathlib import Path

from redis.asyncio import Redis

from helios import registry
from helios.client import AsyncClient, generate_request
from helios.redis_schema import WORKER_PREFIX
from helios.v1.generation_pb2 import SamplingParams
from tests.scripted_worker import endless, scripted_workers, well_behaved
from tests.stack import Stack, start_redis
from tests.streams import stream, until

SIX = generate_request([2, 7], sampling=SamplingParams(max_tokens=6))


async def addresses(client: AsyncClient, *, ready: bool = True) -> set[str]:
    """The workers that the gateway knows and that are ready, or not ready."""
    return {worker.address for worker in (await client.status()).workers if worker.ready == ready}


async def test_a_worker_is_found_by_its_lease_and_forgotten_after_it(stack: Stack) -> None:
    stack.start_redis()
    gateway = stack.start_gateway(discovery_seconds=0.1, redial_seconds=0.1)
    async with AsyncClient(gateway.address) as client, Redis.from_url(stack.redis_url) as redis:
        async with scripted_workers(well_behaved) as (worker,):
            await registry.announce(redis, registry.WorkerLease("a", worker.address), 60)

            async def found() -> bool:
                return await addresses(client) == {worker.address}

            await until(found, "the announced worker to be ready")
            await stream(client, SIX)

            # Its telemetry keeps it in the pool, even without a lease.
            await registry.withdraw(redis, "a")
            await stream(client, SIX)
            assert await addresses(client) == {worker.address}

        async def forgotten() -> bool:
            return not (await client.status()).workers

        await until(forgotten, "the stopped worker without a lease to be forgotten")


async def test_a_request_waits_for_the_first_worker(stack: Stack) -> None:
    stack.start_redis()
    gateway = stack.start_gateway(discovery_seconds=0.1)
    async with (
        AsyncClient(gateway.address) as client,
        Redis.from_url(stack.redis_url) as redis,
        scripted_workers(well_behaved) as (worker,),
    ):
        running = asyncio.create_task(stream(client, SIX))

        async def waits() -> bool:
            return (await client.status()).queued_streams == 1

        await until(waits, "the request to wait")
        await registry.announce(redis, registry.WorkerLease("a", worker.address), 60)
        assert len((await running).tokens) == 6


async def test_a_gateway_that_starts_before_redis_finds_workers_later(stack: Stack, tmp_path: Path) -> None:
    redis, url = start_redis(tmp_path)
    redis.kill()
    gateway = stack.start_gateway(redis_url=url, discovery_seconds=0.1)
    port = int(url.rpartition(":")[2].partition("/")[0])
    async with AsyncClient(gateway.address) as client, scripted_workers(well_behaved) as (worker,):

        async def noticed() -> bool:
            return any("Redis" in problem for problem in (await client.status()).problems)

        await until(noticed, "the status to say that Redis is away")
        stack.processes.append(start_redis(tmp_path, number=1, port=port)[0])
        async with Redis.from_url(url) as connection:
            await registry.announce(connection, registry.WorkerLease("a", worker.address), 60)
        await stream(client, SIX)
        assert list((await client.status()).problems) == []


async def test_spoilt_leases_are_said_once_and_hide_no_worker(stack: Stack) -> None:
    stack.start_redis()
    async with scripted_workers(well_behaved) as (worker,), Redis.from_url(stack.redis_url) as redis:
        gateway = stack.start_gateway(discovery_seconds=0.1)
        async with AsyncClient(gateway.address) as client:
            spoilt = {
                "odd": "not json",
                "list": "[]",
                "short": '{"worker_id": "short"}',
                "typed": '{"worker_id": "typed", "address": 5}',
                "nowhere": '{"worker_id": "nowhere", "address": "here"}',
                "other": f'{{"worker_id": "another", "address": "{worker.address}"}}',
            }
            for name, value in spoilt.items():
                await redis.set(WORKER_PREFIX + name, value)
            await redis.hset(WORKER_PREFIX + "hash", "a", "b")

            async def reported() -> bool:
                problems = (await client.status()).problems
                return any("2 more entries are ignored" in problem for problem in problems)

            await until(reported, "the spoilt leases to be reported")
            newer = {"worker_id": "newer", "address": worker.address, "zone": "b", "weight": 3}
            await redis.set(WORKER_PREFIX + "newer", json.dumps(newer))
            await stream(client, SIX)
            assert await addresses(client) == {worker.address}

            await redis.delete(*(WORKER_PREFIX + name for name in (*spoilt, "hash")))

            async def well() -> bool:
                return not (await client.status()).problems

            await until(well, "the problems to be over")
    for name in (*spoilt, "hash"):
        assert gateway.log.count(f"{WORKER_PREFIX}{name} is ignored") == 1


async def test_a_redis_that_takes_no_writes_is_said_and_streams_go_on(stack: Stack) -> None:
    stack.start_redis()
    async with scripted_workers(well_behaved) as (worker,), Redis.from_url(stack.redis_url) as redis:
        gateway = stack.start_gateway([worker.address], discovery_seconds=0.1)
        async with AsyncClient(gateway.address) as client:

            async def refused() -> bool:
                await stream(client, SIX)
                problems = (await client.status()).problems
                return any("its memory is full; raise its maxmemory" in problem for problem in problems)

            await redis.config_set("maxmemory", 1)
            await until(refused, "the full Redis to be reported")
            await redis.config_set("maxmemory", 0)

            async def well() -> bool:
                return not (await client.status()).problems

            await until(well, "the problem to be over")
            await redis.replicaof("127.0.0.1", "1")

            async def read_only() -> bool:
                await stream(client, SIX)
                return any("read-only replica" in problem for problem in (await client.status()).problems)

            await until(read_only, "the read-only replica to be reported")
    for said in ("its memory is full", "read-only replica"):
        assert gateway.log.count(said) == 1


async def test_streams_go_to_the_model_that_they_name(stack: Stack) -> None:
    async with scripted_workers(well_behaved, well_behaved) as (tiny, other):
        other.telemetry.model = "other"
        gateway = stack.start_gateway([tiny.address, other.address])
        async with AsyncClient(gateway.address) as client:
            for model in ("other", "tiny", "other"):
                request = generate_request("a", model=model, sampling=SamplingParams(max_tokens=2))
                await stream(client, request)
    assert [request.model for request in tiny.requests] == ["tiny"]
    assert [request.model for request in other.requests] == ["other", "other"]


async def test_streams_spread_over_equal_workers(stack: Stack) -> None:
    async with scripted_workers(endless, endless) as workers:
        workers[1].telemetry.running = 0
        gateway = stack.start_gateway([worker.address for worker in workers])
        async with AsyncClient(gateway.address) as client:

            async def both() -> bool:
                return len(await addresses(client)) == 2

            await until(both, "both workers to be ready")
            streams = [client.generate(SIX) for _ in range(10)]
            for events in streams:
                await anext(events)
            assert [len(worker.requests) for worker in workers] == [5, 5]
            for events in streams:
                await events.aclose()
