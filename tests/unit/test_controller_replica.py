"""A replica of the controller and its state, in a real Redis."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from redis.asyncio import Redis

from helios import redis_client
from helios.errors import UnavailableError
from helios.served import ServedPlan
from helios.slo import Objective, Slo
from services.controller import state
from services.controller.leader import Leadership
from services.controller.replica import Replica
from services.controller.settings import ControllerSettings
from tests.streams import until

PLAN = ServedPlan(model="small", depth=4)
SLO = Slo(Objective.ACCURACY)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with redis_client.connect(redis_url) as connection:
        yield connection


@asynccontextmanager
async def running(redis: Redis, controller_id: str) -> AsyncIterator[Replica]:
    leadership = Leadership(redis, controller_id, "127.0.0.1:1", lease_seconds=30)
    settings = ControllerSettings.model_validate({"lease_seconds": 0.3})
    replica = Replica(redis, leadership, settings, on_lead=lambda: None)
    task = asyncio.create_task(replica.run())
    try:
        yield replica
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def leads(replica: Replica) -> bool:
    return replica.is_leading


async def test_changes_that_are_made_at_once_all_stay(redis: Redis) -> None:
    async with running(redis, "a") as replica:
        await until(lambda: leads(replica), "the replica to lead")
        await asyncio.gather(
            replica.change(slo=SLO), replica.change(plan=PLAN), replica.change(pins={"w": PLAN})
        )
        kept = await state.load(redis)
    assert kept is not None
    assert kept == replica.state
    assert (kept.slo, kept.plan, kept.pins) == (SLO, PLAN, {"w": PLAN})


async def test_a_replica_that_stands_by_changes_nothing_and_goes_by_the_leaders_state(redis: Redis) -> None:
    async with running(redis, "a") as leader:
        await until(lambda: leads(leader), "the first replica to lead")
        async with running(redis, "b") as standby:
            await leader.change(slo=SLO)

            async def knows() -> bool:
                return standby.state.slo == SLO

            await until(knows, "the second replica to know the new SLO")
            with pytest.raises(UnavailableError, match=r"the one at 127\.0\.0\.1:1 leads"):
                await standby.check_leading()
            with pytest.raises(UnavailableError):
                await standby.change(plan=PLAN)
            assert standby.state.plan is None
