"""The controller over real workers, gateway and Redis. The profiles are written by hand."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from helios import examples, history
from helios.client import AsyncClient, generate_request
from helios.history import ModelProfile
from helios.redis_schema import CONTROLLER_STATE, DECISIONS, PROFILE_PREFIX, WORKER_PREFIX
from helios.routing.example import ModelExample
from helios.v1 import controller_pb2, controller_pb2_grpc, generation_pb2, worker_pb2, worker_pb2_grpc
from tests.profiles import exit_profile, model_profile
from tests.stack import Process, Stack, start_redis
from tests.streams import Streamed, stream, until

Stub: TypeAlias = "controller_pb2_grpc.ControllerServiceAsyncStub"
SECONDS = 60.0
MODEL = "long"
# Depth 2 is within 5 % of depth 4's perplexity, and twice as fast. Depth 1 is not within 5 %.
EXITS = (exit_profile(1, 0.95), exit_profile(2, 0.905), exit_profile(4, 0.9))
# Leases and timeouts that a slow machine does not exceed by chance. Whoever loses its lease starts over.
QUICK = {
    "telemetry_seconds": 0.1,
    "discovery_seconds": 0.2,
    "lease_seconds": 6,
    "worker_timeout_seconds": 8,
}


@pytest.fixture
def parts(stack: Stack) -> Iterator[Stack]:
    """Redis and two workers at full depth, `a` and `b`."""
    stack.start_redis()
    for worker_id in ("a", "b"):
        # The lease outlives a suspension, so that a frozen worker stays in the fleet.
        stack.start_worker(MODEL, 4, worker_id=worker_id, lease_seconds=30, threshold=0.97)
    yield stack


@asynccontextmanager
async def connect(controller: Process) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(controller.address) as channel:
        yield controller_pb2_grpc.ControllerServiceStub(channel)


async def write_profiles(parts: Stack, *profiles: ModelProfile) -> None:
    async with Redis.from_url(parts.redis_url) as redis:
        for profile in profiles:
            await history.write(redis, profile)


async def tokenizer_id(parts: Stack) -> str:
    async with grpc.aio.insecure_channel(parts.processes[1].address) as channel:
        status = await worker_pb2_grpc.WorkerServiceStub(channel).GetStatus(worker_pb2.GetStatusRequest())
    return str(status.model.tokenizer_id)


async def profile(parts: Stack, time_: float = 1000.0, model: str = MODEL) -> ModelProfile:
    return model_profile(model, EXITS, time=time_, tokenizer_id=await tokenizer_id(parts))


async def get_plan(stub: Stub) -> controller_pb2.GetPlanResponse:
    return await stub.GetPlan(controller_pb2.GetPlanRequest(), timeout=SECONDS)


async def served(stub: Stub) -> dict[str, int]:
    return {plan.worker_id: plan.depth for plan in (await get_plan(stub)).plans}


async def await_depths(stub: Stub, **depths: int) -> None:
    async def reached() -> bool:
        return await served(stub) == depths

    try:
        await until(reached, f"depths {depths}", SECONDS)
    except AssertionError as error:
        raise AssertionError(f"{error}; the plan is {await get_plan(stub)}") from error


async def decision(stub: Stub, trigger: str, *, with_outcome: bool = False) -> controller_pb2.Decision:
    """Waits for the first decision with this trigger. With `with_outcome`, also waits for its outcome."""
    watch = stub.WatchDecisions(controller_pb2.WatchDecisionsRequest(history=100), timeout=SECONDS)
    async for response in watch:
        found = response.decision
        if found.trigger == trigger and (found.HasField("outcome") or not with_outcome):
            watch.cancel()
            return found
    raise AssertionError("the watch ended")


async def decisions_so_far(stub: Stub) -> list[controller_pb2.Decision]:
    """All decisions of the record, in order."""
    request = controller_pb2.WatchDecisionsRequest(history=100, once=True)
    return [one.decision async for one in stub.WatchDecisions(request, timeout=SECONDS)]


def slo(objective: "controller_pb2.Objective.ValueType", **bounds: float) -> controller_pb2.SetSloRequest:
    return controller_pb2.SetSloRequest(slo=controller_pb2.Slo(objective=objective, **bounds))


def start_streams(client: AsyncClient, count: int, tokens: int) -> list["asyncio.Task[Streamed]"]:
    def request(seed: int) -> generation_pb2.SamplingParams:
        return generation_pb2.SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=True)

    return [
        asyncio.create_task(
            stream(client, generate_request(f"def f{seed}(", sampling=request(seed)), timeout_seconds=150)
        )
        for seed in range(count)
    ]


@asynccontextmanager
async def traffic(client: AsyncClient, tokens: int = 100) -> AsyncIterator[None]:
    """Keeps four streams open until the block ends: when one ends, the next begins."""

    async def keep_open() -> None:
        while True:
            await start_streams(client, 1, tokens)[0]

    running = [asyncio.create_task(keep_open()) for _ in range(4)]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_workers_follow_the_slo_while_no_stream_loses_a_token(parts: Stack) -> None:
    gateway = parts.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    await write_profiles(parts, await profile(parts))
    async with AsyncClient(gateway.address) as client:
        running = start_streams(client, 6, 600)
        controller = parts.start_controller(**QUICK)
        async with connect(controller) as stub:
            await await_depths(stub, a=2, b=2)
            answer = await stub.SetSlo(slo(controller_pb2.OBJECTIVE_ACCURACY), timeout=SECONDS)
            assert answer.slo.objective == controller_pb2.OBJECTIVE_ACCURACY
            await await_depths(stub, a=4, b=4)
            for streamed in await asyncio.gather(*running):
                streamed.check()
                assert len(streamed.tokens) == 600
                assert {token.exit_layer for token in streamed.tokens} <= {2, 4}

            first = await decision(stub, "start", with_outcome=True)
            assert first.number == 1
            # Not always the second decision: random models are never sure, so a breach may come in between.
            assert {plan.depth for plan in (await decision(stub, "SLO")).chosen} == {4}
            assert [(one.depth, bool(one.refused)) for one in first.options] == [
                (1, True),
                (2, False),
                (4, True),
            ]
            assert {(plan.worker_id, plan.depth) for plan in first.chosen} == {("a", 2), ("b", 2)}
            assert first.outcome.reload_seconds > 0
            assert first.outcome.stall_seconds > 0

            for bad, said in (
                (slo(controller_pb2.OBJECTIVE_ENERGY), "energy: unknown"),
                (
                    slo(controller_pb2.OBJECTIVE_LATENCY, max_perplexity_increase=0, max_tpot_seconds=0.001),
                    "max_tpot_seconds refuses",
                ),
                (controller_pb2.SetSloRequest(), "throughput, latency"),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.SetSlo(bad, timeout=SECONDS)
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert said in str(refused.value.details())
            assert (await get_plan(stub)).slo.objective == controller_pb2.OBJECTIVE_ACCURACY


def router_example(number: int) -> ModelExample:
    """Half of the prompts are read as well at depth 1 as with all layers. The first tokens show which."""
    is_easy = number % 2 == 0
    words, nats = (range(10, 30), 2.0) if is_easy else (range(40, 60), 4.0)
    ids = tuple(words[(3 * number + at) % len(words)] for at in range(48))
    rest = (nats if is_easy else nats + 1.0, nats + 0.01, nats)
    return ModelExample(
        id=str(number), ids=ids, first_tokens=32, first_nats=nats, rest_nats=rest, token_nats=(nats,) * 47
    )


async def test_real_workers_get_sets_and_a_router_and_a_client_is_told_its_plan(parts: Stack) -> None:
    await write_profiles(parts, await profile(parts))
    async with Redis.from_url(parts.redis_url) as redis:
        await examples.append(redis, MODEL, [router_example(number) for number in range(40)], keep=100)
    gateway = parts.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    controller = parts.start_controller(**QUICK)
    async with connect(controller) as stub, AsyncClient(gateway.address) as client:

        async def routes() -> bool:
            plans = sorted((one.worker_id, one.depth) for one in (await get_plan(stub)).plans)
            has_router = [worker.telemetry.router_number for worker in (await client.status()).workers]
            return plans == [(name, depth) for name in "ab" for depth in (1, 2, 4)] and all(has_router)

        await until(routes, "sets and a router", SECONDS)
        sampling = generation_pb2.SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
        told = await stream(client, generate_request("def f(a, b): return a + b\n" * 4, sampling=sampling))
        assert told.finish.plan_reason
        assert {token.exit_layer for token in told.tokens} <= {1, 2, 4}

        await stub.SetSlo(slo(controller_pb2.OBJECTIVE_ACCURACY), timeout=SECONDS)

        async def is_single() -> bool:
            plans = sorted((one.worker_id, one.depth) for one in (await get_plan(stub)).plans)
            has_router = [worker.telemetry.router_number for worker in (await client.status()).workers]
            return plans == [("a", 4), ("b", 4)] and has_router == [0, 0]

        await until(is_single, "one plan for all, without a router", SECONDS)
        assert "objective accuracy" in (await get_plan(stub)).router.problem
        told = await stream(client, generate_request("def f(a, b): return a + b\n" * 4, sampling=sampling))
        assert {token.exit_layer for token in told.tokens} == {4}


async def test_a_pin_holds_until_it_is_taken_back(parts: Stack) -> None:
    await write_profiles(parts, await profile(parts))
    controller = parts.start_controller(**QUICK)
    async with connect(controller) as stub:
        await await_depths(stub, a=2, b=2)
        pin = controller_pb2.PinRequest(model=MODEL, depth=1, worker_id="b")
        answer = await stub.Pin(pin, timeout=SECONDS)
        assert [(plan.worker_id, plan.depth, plan.pinned) for plan in answer.plans] == [
            ("a", 2, False),
            ("b", 1, True),
        ]
        await stub.SetSlo(slo(controller_pb2.OBJECTIVE_ACCURACY), timeout=SECONDS)
        await await_depths(stub, a=4, b=1)
        await stub.Unpin(controller_pb2.UnpinRequest(worker_id="b"), timeout=SECONDS)
        await await_depths(stub, a=4, b=4)

        await stub.Pin(controller_pb2.PinRequest(model=MODEL, depth=2), timeout=SECONDS)
        assert await served(stub) == {"a": 2, "b": 2}
        await stub.Unpin(controller_pb2.UnpinRequest(worker_id="a"), timeout=SECONDS)
        await await_depths(stub, a=4, b=2)

        for bad, code, said in (
            (("nobody", 2, "a"), grpc.StatusCode.NOT_FOUND, "available: "),
            ((MODEL, 3, "a"), grpc.StatusCode.INVALID_ARGUMENT, "1, 2, 4"),
            ((MODEL, 2, "zoe"), grpc.StatusCode.NOT_FOUND, "known: a, b"),
            ((MODEL, 0, "a"), grpc.StatusCode.INVALID_ARGUMENT, "depth"),
        ):
            model, depth, worker_id = bad
            request = controller_pb2.PinRequest(model=model, depth=depth, worker_id=worker_id)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Pin(request, timeout=SECONDS)
            assert refused.value.code() == code
            assert said in str(refused.value.details())
        assert await served(stub) == {"a": 4, "b": 2}
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Unpin(controller_pb2.UnpinRequest(worker_id="zoe"), timeout=SECONDS)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND

    async with grpc.aio.insecure_channel(controller.address) as channel:
        check = health_pb2.HealthCheckRequest(service="helios.v1.ControllerService")
        health = await health_pb2_grpc.HealthStub(channel).Check(check)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert controller.terminate() == 0


async def test_a_worker_killed_under_a_pin_comes_back_with_its_plan(parts: Stack) -> None:
    """No controller could move it. So the worker must start with its plan, or streams get other tokens."""
    await write_profiles(parts, await profile(parts))
    gateway = parts.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    controller = parts.start_controller(**QUICK)
    async with connect(controller) as stub:
        await await_depths(stub, a=2, b=2)
        await stub.Pin(controller_pb2.PinRequest(model=MODEL, depth=1), timeout=SECONDS)
    controller.kill()
    _, first, second = parts.processes[:3]
    async with AsyncClient(gateway.address) as client:

        async def run(victim: Process | None) -> list[list[int]]:
            """Runs eight streams. The victim is killed when some of their tokens have come."""
            seen = 0

            def count(token: generation_pb2.Token) -> None:
                nonlocal seen
                assert (token.model, token.exit_layer) == (MODEL, 1)
                seen += 1
                if seen == 100 and victim is not None:
                    victim.process.kill()

            sampling = [
                generation_pb2.SamplingParams(max_tokens=400, seed=one, ignore_eos=True) for one in range(8)
            ]
            requests = [generate_request(f"def f{one.seed}(", sampling=one) for one in sampling]
            wholes = await asyncio.gather(*(stream(client, request, count) for request in requests))
            assert any(whole.finish.resumed for whole in wholes) == (victim is not None)
            return [whole.ids for whole in wholes]

        undisturbed = await run(None)
        assert await run(first) == undisturbed
        await asyncio.to_thread(parts.start_worker, MODEL, 4, worker_id="a", threshold=0.97)

        async def both_ready() -> bool:
            return sum(worker.ready for worker in (await client.status()).workers) == 2

        await until(both_ready, "the worker that came back", SECONDS)
        assert await run(second) == undisturbed


async def test_a_new_worker_starts_with_the_plan_in_force(parts: Stack) -> None:
    await write_profiles(parts, await profile(parts))
    controller = parts.start_controller(**QUICK | {"lease_seconds": 60})
    async with connect(controller) as stub:
        await await_depths(stub, a=2, b=2)
    # The frozen controller still leads, but moves no worker.
    with controller.frozen():
        new = await asyncio.to_thread(parts.start_worker, MODEL, 4, worker_id="c")
        async with grpc.aio.insecure_channel(new.address) as channel:
            status = await worker_pb2_grpc.WorkerServiceStub(channel).GetStatus(worker_pb2.GetStatusRequest())
    assert status.model.depth == 2
    assert status.model.threshold == pytest.approx(EXITS[1].threshold), "as calibrated on recent requests"


async def test_a_standby_takes_over_and_resumes_the_orders_of_the_one_that_died(parts: Stack) -> None:
    await write_profiles(parts, await profile(parts))
    leader = parts.start_controller(**QUICK)
    async with connect(leader) as stub:
        await await_depths(stub, a=2, b=2)
        await stub.Pin(controller_pb2.PinRequest(model=MODEL, depth=1, worker_id="b"), timeout=SECONDS)
        bounded = slo(controller_pb2.OBJECTIVE_LATENCY, max_perplexity_increase=0.05)
        await stub.SetSlo(bounded, timeout=SECONDS)
    standby = parts.start_controller(**QUICK)
    async with connect(standby) as stub:

        async def knows_the_leader() -> bool:
            return any(leader.address in problem for problem in (await get_plan(stub)).problems)

        await until(knows_the_leader, "the standby naming the leader", SECONDS)
        assert not (await get_plan(stub)).leading
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.SetSlo(slo(controller_pb2.OBJECTIVE_ACCURACY), timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert leader.address in str(refused.value.details())

        leader.kill()

        async def leads() -> bool:
            return (await get_plan(stub)).leading

        await until(leads, "the standby leading", SECONDS)
        assert (await get_plan(stub)).slo.objective == controller_pb2.OBJECTIVE_LATENCY
        # A worker that comes back with its default plan is moved to the ordered plan.
        parts.processes[2].kill()
        parts.start_worker(MODEL, 4, worker_id="b", lease_seconds=30)
        await await_depths(stub, a=2, b=1)
        assert {plan.worker_id: plan.pinned for plan in (await get_plan(stub)).plans} == {
            "a": False,
            "b": True,
        }


async def test_a_rollout_halts_at_a_worker_that_stops_answering(parts: Stack) -> None:
    await write_profiles(parts, await profile(parts))
    controller = parts.start_controller(**QUICK)
    async with connect(controller) as stub:
        await await_depths(stub, a=2, b=2)
        frozen = parts.processes[2]
        frozen.suspend()
        await stub.SetSlo(slo(controller_pb2.OBJECTIVE_ACCURACY), timeout=SECONDS)

        async def halted() -> bool:
            return any("halted at b" in problem for problem in (await get_plan(stub)).problems)

        await until(halted, "the rollout halting at b", SECONDS)
        assert (await served(stub))["a"] == 4
        assert "halted at b" in (await decision(stub, "SLO", with_outcome=True)).outcome.halted
        frozen.resume()
        await await_depths(stub, a=4, b=4)

        async def well() -> bool:
            return not (await get_plan(stub)).problems

        await until(well, "no problem left", SECONDS)


async def test_a_controller_that_stood_still_goes_on_as_if_nothing_had_been(parts: Stack) -> None:
    await write_profiles(parts, await profile(parts))
    controller = parts.start_controller(**QUICK | {"worker_timeout_seconds": 2, "lease_seconds": 60})
    async with connect(controller) as stub:
        await await_depths(stub, a=2, b=2)
        with controller.frozen():
            await asyncio.sleep(5)
        for _ in range(40):
            assert not (await get_plan(stub)).problems
            await asyncio.sleep(0.05)
    for said in ("telemetry ended", "is gone", "halted"):
        assert said not in controller.log


async def test_a_confidence_breach_loads_deeper(parts: Stack) -> None:
    """Random models never reach a confidence of 0.97. The profile expects it for four tokens in five."""
    gateway = parts.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    await write_profiles(parts, await profile(parts, time.time()))
    controller = parts.start_controller(detection="window", min_dwell_requests=0, **QUICK)
    async with connect(controller) as stub, AsyncClient(gateway.address) as client:
        await await_depths(stub, a=2, b=2)
        running = start_streams(client, 4, 200)
        await await_depths(stub, a=4, b=4)
        await asyncio.gather(*running)
        assert "deeper to long at depth 4" in (await decision(stub, "confidence breach")).reason
        # The breached plan is barred until new traffic has been profiled.
        await write_profiles(parts, await profile(parts, time.time() + 1))
        await await_depths(stub, a=2, b=2)


async def test_a_drift_that_is_not_evaluated_sends_workers_to_the_safest_plan(parts: Stack) -> None:
    """Random models are never sure, but the profile expects sure tokens only. There is no profiler."""
    gateway = parts.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    sure = (exit_profile(2, 0.905, sure=1.0), exit_profile(4, 0.9))
    await write_profiles(parts, model_profile(MODEL, sure, tokenizer_id=await tokenizer_id(parts)))
    controller = parts.start_controller(drift_patience_seconds=0.2, **QUICK)
    async with connect(controller) as stub, AsyncClient(gateway.address) as client:
        await await_depths(stub, a=2, b=2)
        async with traffic(client):
            await await_depths(stub, a=4, b=4)
        retreat = await decision(stub, "drift, not evaluated yet")
        assert "is the safest plan known" in retreat.reason


async def test_a_breach_brings_the_next_reassessment_forward(parts: Stack) -> None:
    gateway = parts.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    await write_profiles(parts, await profile(parts, time.time()))
    controller = parts.start_controller(
        detection="window",
        min_dwell_requests=0,
        reassess_requests=10_000,
        breach_reassess_requests=3,
        **QUICK,
    )
    async with connect(controller) as stub, AsyncClient(gateway.address) as client:
        await await_depths(stub, a=2, b=2)
        async with traffic(client):
            breach = await decision(stub, "confidence breach")
            reassessment = await decision(stub, "reassessment")
        assert reassessment.number > breach.number


async def test_what_only_the_dwell_kept_out_is_chosen_when_it_is_over(parts: Stack) -> None:
    gateway = parts.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    await write_profiles(parts, await profile(parts, time.time()))
    controller = parts.start_controller(
        detection="window",
        min_dwell_requests=8,
        reassess_requests=10_000,
        breach_reassess_requests=10_000,
        **QUICK,
    )
    async with connect(controller) as stub, AsyncClient(gateway.address) as client:
        await await_depths(stub, a=2, b=2)
        running = start_streams(client, 4, 200)
        await await_depths(stub, a=4, b=4)
        await asyncio.gather(*running)
        await write_profiles(parts, await profile(parts, time.time() + 1))
        assert "dwell 8" in (await decision(stub, "reassessment")).reason
        assert await served(stub) == {"a": 4, "b": 4}
        # Some of the first four streams may have ended before the controller answered the breach.
        await asyncio.gather(*start_streams(client, 8, 5))
        await decision(stub, "dwell over")
        await await_depths(stub, a=2, b=2)


async def test_a_plan_that_no_worker_can_load_is_given_up_for_the_next(parts: Stack) -> None:
    """The profile knows an exit that the checkpoint does not have."""
    exits = (exit_profile(2, 0.905), exit_profile(3, 0.9005, step_seconds=0.001), exit_profile(4, 0.9))
    names: Sequence[ModelProfile] = [
        model_profile(MODEL, exits[1:], tokenizer_id=await tokenizer_id(parts)),
    ]
    await write_profiles(parts, *names)
    controller = parts.start_controller(**QUICK)
    async with connect(controller) as stub:
        second = await decision(stub, "failed reload")
        first = await decision(stub, "start", with_outcome=True)
        assert {plan.depth for plan in first.chosen} == {3}
        assert "its depths are 1, 2, 4" in first.outcome.halted
        assert {plan.depth for plan in second.chosen} == {4}
        assert await served(stub) == {"a": 4, "b": 4}


async def test_advice_changes_nothing_and_a_lost_redis_leaves_the_plan(parts: Stack) -> None:
    await write_profiles(
        parts, await profile(parts), model_profile("gone", EXITS, tokenizer_id=await tokenizer_id(parts))
    )
    controller = parts.start_controller(mode="advisory", **QUICK)
    async with connect(controller) as stub:
        advice = await decision(stub, "start")
        assert {plan.depth for plan in advice.chosen} == {2}
        answer = await get_plan(stub)
        assert answer.mode == "advisory"
        assert any("gone is ignored: no worker can load it" in problem for problem in answer.problems)
        await stub.Pin(controller_pb2.PinRequest(model=MODEL, depth=1, worker_id="a"), timeout=SECONDS)
        assert await served(stub) == {"a": 1, "b": 4}

        assert parts.redis is not None
        parts.redis.kill()

        async def said() -> bool:
            return any("Redis" in problem for problem in (await get_plan(stub)).problems)

        await until(said, "the loss of Redis in the problems", SECONDS)
        assert await served(stub) == {"a": 1, "b": 4}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Unpin(controller_pb2.UnpinRequest(), timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE

        # The Redis that comes back is empty. The orders are still known.
        port = int(parts.redis_url.rpartition(":")[2].partition("/")[0])
        parts.processes.append(start_redis(parts.directory, 9, port)[0])

        async def leads_with_its_orders() -> bool:
            async with Redis.from_url(parts.redis_url) as redis:
                kept = await redis.hget(CONTROLLER_STATE, "state")
            return (await get_plan(stub)).leading and b'"a"' in (kept or b"")

        await until(leads_with_its_orders, "the pin in the new Redis", SECONDS)
    assert controller.terminate() == 0


async def test_spoilt_entries_are_said_once_and_the_rest_decides(parts: Stack) -> None:
    good = await profile(parts)
    newer = good.model_dump(mode="json") | {"weather": "fine"}
    async with Redis.from_url(parts.redis_url) as redis:
        await redis.set(PROFILE_PREFIX + MODEL, json.dumps(newer))
        await redis.set(PROFILE_PREFIX + "odd", "not json")
        await redis.set(WORKER_PREFIX + "odd", "not json")
        await redis.hset(CONTROLLER_STATE, "state", '{"slo": {"objective": "throughput"}, "routes": ["x"]}')
        await redis.xadd(DECISIONS, {"kind": "decision", "number": 7, "json": "not json"})
        controller = parts.start_controller(**QUICK)
        async with connect(controller) as stub:
            await await_depths(stub, a=2, b=2)
            assert [one.trigger for one in await decisions_so_far(stub)] == ["start"]

            async def said() -> bool:
                problems = " ".join((await get_plan(stub)).problems)
                return all(
                    f"{key} is ignored" in problems for key in (PROFILE_PREFIX + "odd", WORKER_PREFIX + "odd")
                )

            await until(said, "the spoilt entries in the problems", SECONDS)
            assert any(problem.startswith(DECISIONS) for problem in (await get_plan(stub)).problems)
            await decisions_so_far(stub)
        kept = json.loads(await redis.hget(CONTROLLER_STATE, "state") or "")
    assert (kept["routes"], kept["plan"]["depth"]) == (["x"], 2)
    for entry in (PROFILE_PREFIX + "odd", WORKER_PREFIX + "odd", DECISIONS):
        assert controller.log.count(f'"{entry}') == 1


async def test_a_redis_that_takes_no_writes_leaves_the_plan_and_is_said_once(parts: Stack) -> None:
    await write_profiles(parts, await profile(parts))
    controller = parts.start_controller(**QUICK)
    async with connect(controller) as stub, Redis.from_url(parts.redis_url) as redis:
        await await_depths(stub, a=2, b=2)
        await redis.replicaof("127.0.0.1", "1")

        async def said() -> bool:
            answer = await get_plan(stub)
            return not answer.leading and any("read-only replica" in problem for problem in answer.problems)

        await until(said, "the read-only replica in the problems", SECONDS)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.SetSlo(slo(controller_pb2.OBJECTIVE_ACCURACY), timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert await served(stub) == {"a": 2, "b": 2}
        await redis.replicaof("NO", "ONE")

        async def well() -> bool:
            answer = await get_plan(stub)
            return answer.leading and not answer.problems

        await until(well, "the controller leading again", SECONDS)
    assert controller.log.count("the last plan stays: Redis refuses it") == 1


async def test_the_profiler_is_asked_at_the_start_and_every_interval(stack: Stack) -> None:
    stack.start_redis()
    stack.start_worker("tiny", 4, worker_id="a")
    gateway = stack.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    profiler = stack.start_profiler()
    options = {"profiler": profiler.address, "models_dir": stack.models_dir, "reassess_requests": 4}
    controller = stack.start_controller(profiling_share=1, **options, **QUICK)
    async with connect(controller) as stub, AsyncClient(gateway.address) as client:
        first = await decision(stub, "start")
        assert {one.model for one in first.options} == {"tiny", "other", "long"}
        async with traffic(client, tokens=20):
            await decision(stub, "reassessment")
            first = await decision(stub, "start", with_outcome=True)
        assert first.outcome.requests >= 1
        assert first.outcome.tokens_per_second > 0

        profiler.kill()
        made = len(await decisions_so_far(stub))

        async def went_on() -> bool:
            later = (await decisions_so_far(stub))[made:]
            said = any(profiler.address in problem for problem in (await get_plan(stub)).problems)
            return said and any(one.trigger == "reassessment" for one in later)

        async with traffic(client, tokens=20):
            await until(went_on, "a reassessment without the profiler, and that said", SECONDS)


async def test_reassessments_are_put_off_to_keep_profiling_within_its_share(stack: Stack) -> None:
    stack.start_redis()
    stack.start_worker("tiny", 4, worker_id="a")
    gateway = stack.start_gateway(telemetry_seconds=0.1, discovery_seconds=0.2)
    profiler = stack.start_profiler()
    options = {"profiler": profiler.address, "models_dir": stack.models_dir, "reassess_requests": 4}
    controller = stack.start_controller(profiling_share=1e-6, **options, **QUICK)
    async with connect(controller) as stub, AsyncClient(gateway.address) as client:
        await decision(stub, "start")
        async with traffic(client, tokens=20):

            async def put_off() -> bool:
                return "it is due, and put off" in (await get_plan(stub)).next_assessment

            await until(put_off, "the delay said in the plan", SECONDS)
        assert not any(one.trigger == "reassessment" for one in await decisions_so_far(stub))


async def test_speeds_measured_with_other_threads_than_the_workers_have_are_said(parts: Stack) -> None:
    timed = (await profile(parts)).model_copy(update={"provenance": {"threads": "7"}})
    await write_profiles(parts, timed)
    controller = parts.start_controller(**QUICK)
    async with connect(controller) as stub:

        async def said() -> bool:
            return any("with 7 CPU thread(s)" in problem for problem in (await get_plan(stub)).problems)

        await until(said, "the other thread count in the problems", SECONDS)
