"""The watch over workers, as a gateway uses it and as a controller does."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from helios import redis_client, registry
from helios.registry import WorkerLease
from services.controller.fleet import Fleet
from services.controller.settings import ControllerSettings
from services.gateway.settings import GatewaySettings
from services.gateway.worker_pool import WorkerPool
from tests.scripted_worker import scripted_workers, well_behaved
from tests.streams import until

TIMEOUT = 0.6
PACE = {"telemetry_seconds": 0.05, "worker_timeout_seconds": TIMEOUT, "discovery_seconds": 0.1}


@asynccontextmanager
async def watched_pool(address: str) -> AsyncIterator[WorkerPool]:
    """A gateway's pool in which the worker at this address is ready."""
    pool = WorkerPool(GatewaySettings.model_validate({"workers": address, **PACE}))
    pool.start()
    try:
        await until_true(lambda: pool.workers[0].ready)
        yield pool
    finally:
        await pool.close()


@asynccontextmanager
async def watched_fleet(address: str, redis_url: str) -> AsyncIterator[Fleet]:
    """A controller's fleet in which the worker at this address serves."""
    async with redis_client.connect(redis_url) as redis:
        await registry.announce(redis, WorkerLease("a", address), 60)
        fleet = Fleet(redis, ControllerSettings.model_validate(PACE))
        running = asyncio.create_task(fleet.run())
        try:
            await until_true(lambda: fleet.is_settled)
            yield fleet
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await fleet.close()


async def until_true(condition: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return condition()

    await until(holds, "the worker to be known as the test wants it", 20, 0.01)


async def always(condition: Callable[[], bool], seconds: float) -> None:
    """Checks the condition at every turn of the event loop for this many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert condition()
        await asyncio.sleep(0)


async def test_a_gateway_that_stood_still_gives_up_no_worker() -> None:
    async with scripted_workers(well_behaved) as (worker,), watched_pool(worker.address) as pool:
        # This blocks the whole process, like SIGSTOP.
        time.sleep(3 * TIMEOUT)  # noqa: ASYNC251
        await always(lambda: pool.workers[0].ready, TIMEOUT)


async def test_a_controller_that_stood_still_calls_no_worker_silent(redis_url: str) -> None:
    async with (
        scripted_workers(well_behaved) as (worker,),
        watched_fleet(worker.address, redis_url) as fleet,
    ):
        time.sleep(3 * TIMEOUT)  # noqa: ASYNC251
        await always(lambda: bool(fleet.serving) and not fleet.problems(), TIMEOUT)


async def test_a_worker_that_tells_nothing_is_given_up_until_it_tells_again(redis_url: str) -> None:
    async with (
        scripted_workers(well_behaved) as (worker,),
        watched_pool(worker.address) as pool,
        watched_fleet(worker.address, redis_url) as fleet,
    ):
        worker.is_quiet = True
        await until_true(lambda: not pool.workers[0].ready and not fleet.serving)
        assert pool.workers[0].problem == f"it has sent no telemetry for {TIMEOUT:g} s"
        assert fleet.problems() == [f"a at {worker.address} does not answer"]
        worker.is_quiet = False
        await until_true(lambda: pool.workers[0].ready and bool(fleet.serving))


async def test_a_worker_whose_lease_names_another_address_is_watched_there(redis_url: str) -> None:
    async with (
        scripted_workers(well_behaved, well_behaved) as (first, second),
        watched_fleet(first.address, redis_url) as fleet,
        redis_client.connect(redis_url) as redis,
    ):
        await registry.announce(redis, WorkerLease("a", second.address), 60)
        await until_true(lambda: [one.address for one in fleet.serving] == [second.address])
