"""Where a stream goes whose plan is chosen for it, and how it goes on under that plan."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from helios.client import AsyncClient, generate_request
from helios.errors import InvalidRequestError, UnavailableError, UnknownModelError
from helios.served import ServedPlan
from helios.slo import Objective
from helios.v1 import controller_pb2, inference_pb2
from helios.v1.generation_pb2 import SamplingParams
from tests.scripted_worker import (
    PLACES,
    Request,
    Response,
    Script,
    ScriptedWorker,
    chunk,
    finish,
    redirect,
    scripted_workers,
    well_behaved,
)
from tests.stack import Stack
from tests.streams import stream, until

IDS = [100, 101, 102, 103, 104, 105]
TINY_2, TINY_4 = ServedPlan(model="tiny", depth=2), ServedPlan(model="tiny", depth=4)
OTHER_2 = ServedPlan(model="other", depth=2)
QUICK = {"telemetry_seconds": 0.05, "resume_backoff_seconds": 0.01}


def six(model: str = "") -> inference_pb2.GenerateRequest:
    return generate_request([2, 7], model=model, sampling=SamplingParams(max_tokens=6))


@asynccontextmanager
async def connected(
    stack: Stack, workers: list[ScriptedWorker], **settings: object
) -> AsyncIterator[AsyncClient]:
    """A client of a gateway that has heard of every plan of these workers."""
    gateway = stack.start_gateway([worker.address for worker in workers], **QUICK, **settings)

    async with AsyncClient(gateway.address) as client:

        async def all_ready() -> bool:
            return all(worker.ready for worker in (await client.status()).workers)

        await until(all_ready, "the workers to be ready")
        yield client
    assert "Traceback" not in gateway.log


def redirects_to(*plans: tuple[ServedPlan, float]) -> Script:
    """Redirects what asks for a choice, and serves what names its plan."""

    async def script(request: Request, seconds: float) -> AsyncIterator[Response]:
        if request.HasField("route"):
            yield redirect(*plans)
            return
        async for response in well_behaved(request, seconds):
            yield response

    return script


def under(response: Response, plan: ServedPlan) -> Response:
    """The same finish or chunk, under this plan."""
    for token in response.chunk.tokens:
        token.model, token.exit_layer = plan.model, plan.depth
    if response.HasField("finish"):
        response.finish.model, response.finish.depth = plan.model, plan.depth
    return response


async def as_named(request: Request, seconds: float) -> AsyncIterator[Response]:
    """Serves a request under the plan that it names."""
    async for response in well_behaved(request, seconds):
        yield under(response, ServedPlan(model=request.model, depth=request.depth))


async def test_a_preference_reaches_the_worker_that_chooses(stack: Stack) -> None:
    async with scripted_workers(well_behaved) as workers:
        workers[0].serve(TINY_4, OTHER_2)
        async with connected(stack, workers) as client:
            request = generate_request(
                [2, 7],
                sampling=SamplingParams(max_tokens=6),
                max_perplexity_increase=0.02,
                objective=Objective.LATENCY,
            )
            await stream(client, request)
            await stream(client, six())
            await stream(client, six("other"))
        asked, default, named = workers[0].requests
    assert asked.route.max_perplexity_increase == 0.02
    assert asked.route.objective == controller_pb2.OBJECTIVE_LATENCY
    assert (asked.model, asked.depth) == ("", 0), "all models may be chosen"
    assert default.HasField("route")
    assert not default.route.HasField("max_perplexity_increase")
    assert named.HasField("route")
    assert named.model == "other"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_perplexity_increase", float("nan")),
        ("max_perplexity_increase", -0.01),
        ("objective", controller_pb2.OBJECTIVE_ENERGY),
    ],
)
async def test_a_preference_out_of_range_reaches_no_worker(stack: Stack, field: str, value: float) -> None:
    async with scripted_workers(well_behaved) as workers:
        async with connected(stack, workers) as client:
            request = six()
            setattr(request, field, value)
            with pytest.raises(InvalidRequestError, match=f"^{field} must be"):
                await stream(client, request)
        assert workers[0].requests == []


async def test_a_redirected_stream_goes_to_a_worker_with_its_plan(stack: Stack) -> None:
    async with scripted_workers(redirects_to((OTHER_2, 0.0), (TINY_4, 0.1)), as_named) as workers:
        workers[0].serve(TINY_4)
        workers[1].serve(TINY_2, OTHER_2)
        async with connected(stack, workers) as client:
            whole = await stream(client, six())
            assert all(worker.ready for worker in (await client.status()).workers), "nothing is suspected"
        (routed,), (named,) = (worker.requests for worker in workers)
    assert whole.ids == IDS
    assert routed.HasField("route")
    assert not named.HasField("route")
    assert (named.model, named.depth) == ("other", 2)
    assert whole.finish.resumed == 0, "a redirect is no loss"
    assert (whole.finish.model, whole.finish.depth) == ("other", 2)
    assert whole.finish.expected_perplexity_increase == 0.02
    assert whole.finish.plan_reason == "other at depth 2 was ranked"


async def test_a_redirected_stream_spills_over_rather_than_wait(stack: Stack) -> None:
    # Worker b has the best plan, and a full batch. The other plan is back at a, for one second a token more.
    ranked = ((OTHER_2, 0.0), (TINY_4, 1.0))
    async with scripted_workers(redirects_to(*ranked), as_named) as workers:
        workers[0].serve(TINY_4)
        workers[1].serve(OTHER_2)
        for waiting, served in ((5, OTHER_2), (7, TINY_4)):
            workers[1].telemetry.running = PLACES
            workers[1].telemetry.waiting = waiting - 1
            # The first place of a worker on which nothing has ended yet is expected after a second.
            async with connected(stack, workers, overload_retry_seconds=1) as client:
                await stream(client, six())
            last = [worker.requests[-1] for worker in workers]
            named = last[0] if served == TINY_4 else last[1]
            assert (named.model, named.depth) == (served.model, served.depth)


async def test_a_redirected_stream_waits_for_its_plan_and_takes_no_other(stack: Stack) -> None:
    async with scripted_workers(redirects_to((OTHER_2, 0.0)), as_named) as workers:
        workers[0].serve(TINY_4)
        workers[1].serve(TINY_2)
        async with connected(stack, workers) as client:
            running = asyncio.create_task(stream(client, six()))

            async def redirected() -> bool:
                return bool(workers[0].requests)

            await until(redirected, "the stream to be redirected")
            workers[1].serve(TINY_2, OTHER_2)
            whole = await running
        assert (whole.finish.model, whole.finish.depth) == ("other", 2)


async def test_a_stream_whose_plan_comes_nowhere_ends_with_the_reason(stack: Stack) -> None:
    async with scripted_workers(redirects_to((OTHER_2, 0.0), (TINY_2, 0.1))) as workers:
        workers[0].serve(TINY_4)
        async with connected(stack, workers, worker_wait_seconds=0.3) as client:
            with pytest.raises(
                UnavailableError, match=r"serves other at depth 2 or tiny at depth 2: a at .* serves tiny at"
            ):
                await stream(client, six())


async def test_a_worker_that_redirects_again_and_again_is_left(stack: Stack) -> None:
    async def always(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield redirect((TINY_4, 0.0))

    async def without_a_plan(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield redirect()

    async with scripted_workers(always, without_a_plan, well_behaved) as workers:
        for worker in workers:
            worker.serve(TINY_4)
        async with connected(stack, workers) as client:
            whole = await stream(client, six())
        asked = [len(worker.requests) for worker in workers]
    assert whole.ids == IDS
    assert whole.finish.resumed == 2
    assert asked == [2, 1, 1]


async def test_a_plan_that_ended_before_the_stream_came_is_chosen_again(stack: Stack) -> None:
    async def ended(request: Request, seconds: float) -> AsyncIterator[Response]:
        if request.depth:
            workers[1].serve(TINY_2)
            raise UnknownModelError("other is not served")
        async for response in well_behaved(request, seconds):
            yield under(response, TINY_2)

    async with scripted_workers(redirects_to((OTHER_2, 0.0)), ended) as workers:
        workers[0].serve(TINY_4)
        workers[1].serve(OTHER_2)
        async with connected(stack, workers, worker_wait_seconds=0.5) as client:
            with pytest.raises(UnavailableError, match="other at depth 2"):
                await stream(client, six())
        asked = [request.HasField("route") for request in workers[0].requests]
    assert asked == [True, True], "after the loss it is routed once more"


async def test_a_stream_goes_on_under_its_very_plan(stack: Stack) -> None:
    async def dies_under_tiny_2(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield under(chunk(0, 1, 2), TINY_2)
        raise UnavailableError("gone")

    async with scripted_workers(dies_under_tiny_2, as_named, as_named) as workers:
        workers[0].serve(TINY_4, TINY_2)
        workers[1].serve(TINY_4, OTHER_2)
        workers[2].serve(OTHER_2, TINY_2)
        async with connected(stack, workers) as client:
            whole = await stream(client, six())
            assert whole.ids == IDS
            assert whole.finish.resumed == 1
            assert workers[1].requests == [], "it has less load, but not the plan"
            (request,) = workers[2].requests
            assert (request.model, request.depth) == ("tiny", 2)
            assert not request.HasField("route")

            workers[2].serve(OTHER_2)

            async def heard() -> bool:
                plans = [worker.telemetry.plans for worker in (await client.status()).workers]
                return any(len(one) == 1 for one in plans)

            await until(heard, "the plan to be gone")
            whole = await stream(client, six())
        assert whole.ids == IDS
        (request,) = workers[1].requests
        assert (request.model, request.depth) == ("tiny", 4), "the next deeper one of its model"


async def test_a_worker_that_is_lost_without_a_token_does_not_change_the_plan(stack: Stack) -> None:
    async def dies_under_tiny_2(request: Request, seconds: float) -> AsyncIterator[Response]:
        yield under(chunk(0, 1, 2), TINY_2)
        raise UnavailableError("gone")

    async def dies_once_c_has_the_plan(request: Request, seconds: float) -> AsyncIterator[Response]:
        workers[2].serve(TINY_4, TINY_2)

        async def heard() -> bool:
            states = (await client.status()).workers
            return any(len(state.telemetry.plans) == 2 and state.worker_id == "c" for state in states)

        await until(heard, "the plan to be in force at c")
        raise UnavailableError("gone")
        yield

    async with scripted_workers(dies_under_tiny_2, dies_once_c_has_the_plan, as_named) as workers:
        workers[0].serve(TINY_4, TINY_2)
        workers[1].serve(TINY_4)
        workers[2].serve(TINY_4)
        async with connected(stack, workers) as client:
            whole = await stream(client, six())
    assert whole.ids == IDS
    (second,), (third,) = workers[1].requests, workers[2].requests
    assert (second.depth, third.depth) == (4, 2)


async def test_status_tells_every_plan_of_a_worker(stack: Stack) -> None:
    async with scripted_workers(well_behaved) as workers:
        workers[0].serve(TINY_4, OTHER_2)
        workers[0].telemetry.plans[1].running = 3
        async with connected(stack, workers) as client:
            (worker,) = (await client.status()).workers
            with pytest.raises(UnknownModelError, match="served are other, tiny"):
                await stream(client, six("nobody"))
    told = [(one.plan.model, one.plan.depth, one.running) for one in worker.telemetry.plans]
    assert told == [("tiny", 4, 0), ("other", 2, 3)]


async def test_a_worker_without_a_router_is_asked_as_one_with_a_single_plan(stack: Stack) -> None:
    async with scripted_workers(well_behaved) as workers, connected(stack, workers) as client:
        whole = await stream(client, six())
        (request,) = workers[0].requests
    assert request.model == "tiny"
    assert whole.finish.completion_tokens == len(finish(6).finish.text)
