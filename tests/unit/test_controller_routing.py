"""The controller in router mode, over scripted workers, a scripted profiler and a real Redis."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeAlias

import grpc
import pytest
from redis.asyncio import Redis

from helios import examples, history, redis_client, registry
from helios.history import DecodeSpeed, ExitProfile, ModelProfile
from helios.orders import EVERY_WORKER
from helios.redis_schema import CONTROLLER_STATE, ROUTER
from helios.registry import WorkerLease
from helios.routing.example import ModelExample
from helios.routing.router import Router
from helios.served import ServedPlan
from helios.slo import Objective, Slo
from helios.v1 import profiler_pb2, profiler_pb2_grpc, worker_pb2, worker_pb2_grpc
from services.controller import record
from services.controller.controller import Controller
from services.controller.leader import Leadership
from services.controller.settings import ControllerSettings
from services.controller.situation import Trigger
from tests.profiles import exit_profile, model_profile
from tests.routing_examples import DEPTHS, FIRST_TOKENS, MODELS, example
from tests.scripted_worker import ScriptedWorker, well_behaved
from tests.streams import until

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
ALL = {ServedPlan(model=model, depth=depth) for model in MODELS for depth in DEPTHS}
MEMORY = 10**9
SETTINGS = {
    "telemetry_seconds": 0.05,
    "discovery_seconds": 0.1,
    "routing_push_seconds": 0.05,
    "min_dwell_requests": 0,
    "reassess_requests": 100_000,
    "lease_seconds": 30,
}


def profile(model: str) -> ModelProfile:
    """An early exit is beyond the bound. On the profiled traffic `prose` is a little better."""
    exits = [
        _timed(exit_profile(depth, 0.9 + (0.0 if model == "prose" else 0.02) + more))
        for depth, more in zip(DEPTHS, (0.2, 0.05, 0.0), strict=True)
    ]
    return model_profile(model, exits, tokenizer_id="scripted")


def _timed(one: ExitProfile) -> ExitProfile:
    """A row takes 10 us a layer, so that batches gain nothing."""
    speeds = tuple(DecodeSpeed(batch=size, step_seconds=1e-5 * one.depth * size) for size in (1, 16))
    return one.model_copy(update={"decode": speeds, "prefill_tokens_per_second": 1e6 / one.depth})


class Worker(ScriptedWorker):
    """Loads and routes as it is told. `refuses`: which sets it cannot load."""

    def __init__(self, worker_id: str, memory_bytes: int = MEMORY) -> None:
        super().__init__(worker_id, well_behaved, "prose")
        self.telemetry.depth = DEPTHS[-1]
        self.memory_bytes = memory_bytes
        self.refuses: Callable[[set[ServedPlan]], bool] = lambda _: False
        self.reloads: list[worker_pb2.ReloadRequest] = []
        self.routers: list[bytes] = []
        self.refuses_routers = False
        # Told with the next telemetry.
        self.prompts: list[worker_pb2.ServedPrompt] = []

    @property
    def plans(self) -> set[ServedPlan]:
        """The plans in force."""
        listed = [(one.plan.model, one.plan.depth) for one in self.telemetry.plans]
        listed = listed or [(self.telemetry.model, self.telemetry.depth)]
        return {ServedPlan(model=model, depth=depth) for model, depth in listed}

    async def Reload(  # noqa: N802
        self, request: worker_pb2.ReloadRequest, context: Context
    ) -> AsyncIterator[worker_pb2.ReloadResponse]:
        plans = [ServedPlan(model=one.model, depth=one.depth) for one in (request, *request.also)]
        self.reloads.append(request)
        if self.refuses(set(plans)):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "it does not fit")
        self.serve(*plans, router_number=self.telemetry.router_number)
        yield worker_pb2.ReloadResponse(stage=worker_pb2.RELOAD_STAGE_DONE, seconds=0.1)

    async def SetRouter(  # noqa: N802
        self, request: worker_pb2.SetRouterRequest, context: Context
    ) -> worker_pb2.SetRouterResponse:
        if self.refuses_routers:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "of another version")
        self.routers.append(request.router)
        self.telemetry.router_number = Router.from_json(request.router).number if request.router else 0
        return worker_pb2.SetRouterResponse()

    async def GetStatus(  # noqa: N802
        self, request: worker_pb2.GetStatusRequest, context: Context
    ) -> worker_pb2.GetStatusResponse:
        status = await super().GetStatus(request, context)
        status.models.extend(MODELS)
        status.memory_bytes, status.threads, status.block_tokens = self.memory_bytes, 1, 16
        return status

    async def WatchTelemetry(  # noqa: N802
        self, request: worker_pb2.WatchTelemetryRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchTelemetryResponse]:
        assert request.served_prompts
        async for response in super().WatchTelemetry(request, context):
            response.served_prompts.extend(self.prompts)
            self.prompts = []
            yield response

    def route(self, kind: str, count: int, begin: int = 0) -> None:
        """Prompts of a kind come and are served with all layers of the model that reads them best."""
        for number in range(begin, begin + count):
            one = example(kind, 5000 + number)
            best = min(MODELS, key=lambda name: one.rest_nats[name][-1])
            self.prompts.append(
                worker_pb2.ServedPrompt(
                    plan=worker_pb2.Plan(model=best, depth=DEPTHS[-1]),
                    prompt_tokens=len(one.ids),
                    readings=[
                        worker_pb2.ExitReading(
                            model=name, depth=DEPTHS[0], tokens=12, nats=one.first_nats[name]
                        )
                        for name in MODELS
                    ],
                    tokens=16,
                    nats=16 * one.rest_nats[best][-1],
                    first_ids=one.ids[:FIRST_TOKENS],
                )
            )
        self.telemetry.finished_sequences += count


class Profiler(profiler_pb2_grpc.ProfilerServiceServicer):
    """Evaluates prompts of the kinds in `kinds` for the router. Profiles stay as they are."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.kinds: tuple[str, ...] = MODELS
        self.evaluated: list[profiler_pb2.EvaluateRequest] = []
        self.count = 0

    async def Evaluate(  # noqa: N802
        self, request: profiler_pb2.EvaluateRequest, context: Context
    ) -> AsyncIterator[profiler_pb2.EvaluateResponse]:
        self.evaluated.append(request)
        if not request.for_router:
            return
        numbers = range(self.count, self.count + request.requests)
        self.count += request.requests
        for model in request.models:
            found = [model_example(self.kinds[number % len(self.kinds)], number, model) for number in numbers]
            await examples.append(self.redis, model, found, 1000)
            result = profiler_pb2.RouterEvaluation(model=model, examples=len(found), cpu_seconds=1e-6)
            yield profiler_pb2.EvaluateResponse(router_result=result)


def model_example(kind: str, number: int, model: str) -> ModelExample:
    """An example as one model sees it."""
    one = example(kind, number)
    return ModelExample(
        id=one.id,
        ids=one.ids,
        first_tokens=one.first_tokens,
        first_nats=one.first_nats[model],
        rest_nats=one.rest_nats[model],
        token_nats=one.token_nats[model],
    )


class Scene:
    """A controller that leads two workers, with a profiler."""

    def __init__(
        self, redis: Redis, controller: Controller, workers: list[Worker], profiler: Profiler
    ) -> None:
        self.redis, self.controller, self.workers, self.profiler = redis, controller, workers, profiler

    async def serve(self, requests: int) -> None:
        """So many requests finish, one after the other."""
        for _ in range(requests):
            self.workers[0].telemetry.finished_sequences += 1
            await asyncio.sleep(0.01)

    async def until(self, condition: Callable[[], bool], what: str, *, serving: bool = False) -> None:
        """Waits. serving: requests finish meanwhile."""

        async def holds() -> bool:
            if serving:
                self.workers[0].telemetry.finished_sequences += 1
            return condition()

        try:
            await until(holds, what, 30, 0.02)
        except AssertionError as error:
            decisions = [one.entry.decision.reason for one in await self.decisions()]
            said = [*self.controller.problems(), *decisions]
            raise AssertionError(f"{error}: {said}; {self.controller.routing.state()}") from error

    async def decisions(self, trigger: Trigger | None = None) -> list[record.NumberedDecision]:
        """Those of the record, in order."""
        found = (await record.read_last(self.redis, 1000))[0]
        return [one for one in found if trigger is None or one.entry.decision.trigger is trigger]

    async def until_routed(self) -> None:
        """Waits until all workers have all plans and a router."""
        await self.until(
            lambda: all(one.plans == ALL and one.telemetry.router_number for one in self.workers),
            "all workers to have all plans and a router",
            serving=True,
        )


@asynccontextmanager
async def scene(
    redis_url: str, *, memory: tuple[int, ...] = (MEMORY, MEMORY), **settings: object
) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_client.connect(redis_url))
        for model in MODELS:
            await history.write(redis, profile(model))
        workers, profiler = [], Profiler(redis)
        for name, size in zip("abc", memory, strict=False):
            worker = Worker(name, size)
            server = grpc.aio.server()
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
            worker.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
            await registry.announce(redis, WorkerLease(name, worker.address), 60)
            workers.append(worker)
        server = grpc.aio.server()
        profiler_pb2_grpc.add_ProfilerServiceServicer_to_server(profiler, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        stack.push_async_callback(server.stop, None)
        values = ControllerSettings.model_validate(SETTINGS | {"profiler": address} | settings)
        controller = Controller(redis, values, Leadership(redis, "c", "127.0.0.1:1", values.lease_seconds))
        running = asyncio.create_task(controller.run())
        try:
            yield Scene(redis, controller, workers, profiler)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await controller.close()


async def test_a_router_is_learnt_while_serving_and_workers_get_their_sets(redis_url: str) -> None:
    async with scene(redis_url) as seen:
        state = seen.controller.routing.state
        few = "0 requests have been evaluated for the router, 24 are needed"
        await seen.until(lambda: state().problem == few, "the reason why nothing is routed")
        await seen.until_routed()
        asked = [one.requests for one in seen.profiler.evaluated if one.for_router]
        assert asked[:2] == [8, 16]
        chosen = (await seen.decisions(Trigger.ROUTING))[0].entry
        assert chosen.replay() == chosen.decision
        assert {(one.model, one.depth) for one in chosen.decision.chosen if one.worker_id == "a"} == {
            (one.model, one.depth) for one in ALL
        }
        assert "the quickest single plan within the bound" in chosen.decision.reason
        # The first plan of a set is the single plan, for requests that are not routed.
        first = seen.controller.replica.state.plan
        assert {(one.telemetry.model, one.telemetry.depth) for one in seen.workers} == {
            (first.model, first.depth)
        }
        assert seen.workers[0].reloads[-1].also[0].threshold > 0
        saved = Router.from_json(await seen.redis.get(ROUTER) or b"")
        assert {one.plan for one in saved.knowledge.plans} == ALL
        assert state().number == saved.number
        assert not state().problem


async def test_the_router_follows_what_was_routed(redis_url: str) -> None:
    async with scene(redis_url) as seen:
        await seen.until_routed()
        before = seen.controller.routing.router
        seen.workers[0].route("prose", 60)
        await seen.until(
            lambda: (
                seen.controller.routing.router.terms.usual_model == "prose"
                and seen.controller.routing.router.number > before.number
            ),
            "terms for prose",
        )
        state = seen.controller.routing.state()
        assert [(one.model, one.depth, one.share) for one in state.shares] == [("prose", 12, 1.0)]
        assert abs(state.served_surprise) < 0.2
        await seen.until(
            lambda: all(
                one.telemetry.router_number == seen.controller.routing.router.number for one in seen.workers
            ),
            "all workers with the last router",
        )


async def test_traffic_unlike_all_examples_is_evaluated_at_once(redis_url: str) -> None:
    async with scene(redis_url, profiling_share=1e-9) as seen:
        await seen.until_routed()
        await seen.until(
            lambda: sum(one.for_router for one in seen.profiler.evaluated) == 3, "32", serving=True
        )
        seen.profiler.kinds = ("other",)
        seen.workers[1].route("other", 6)
        await seen.until(
            lambda: any(
                one.for_router and one.fresh and one.requests == 8 for one in seen.profiler.evaluated
            ),
            "the evaluation of the new traffic",
        )


async def test_an_objective_that_no_router_serves_goes_back_to_a_single_plan(redis_url: str) -> None:
    async with scene(redis_url) as seen:
        await seen.until_routed()
        await seen.controller.operator.set_slo(Slo(Objective.ACCURACY))
        await seen.until(
            lambda: all(len(one.plans) == 1 and not one.telemetry.router_number for one in seen.workers),
            "single plans without a router",
        )
        assert await seen.redis.get(ROUTER) is None
        decision = (await seen.decisions(Trigger.SLO))[-1].entry
        assert "one plan for all: a router does not serve the objective accuracy" in decision.decision.reason
        assert decision.replay() == decision.decision
        await seen.controller.operator.set_slo(Slo())
        await seen.until_routed()


async def test_a_pinned_worker_keeps_its_pin(redis_url: str) -> None:
    async with scene(redis_url) as seen:
        await seen.until_routed()
        pin = ServedPlan(model="prose", depth=6)
        await seen.controller.operator.pin(pin, "b")
        await seen.until(lambda: seen.workers[1].plans == {pin}, "the pin")
        assert seen.workers[0].plans == ALL
        await seen.controller.operator.unpin("b")
        await seen.until_routed()


async def test_a_worker_that_refuses_a_set_leads_to_a_smaller_one_or_a_single_plan(redis_url: str) -> None:
    async with scene(redis_url) as seen:
        seen.workers[1].refuses = lambda plans: len(plans) > 1
        await seen.until(
            lambda: any(request.also for request in seen.workers[1].reloads), "the refusal", serving=True
        )
        await seen.until(
            lambda: all(len(one.plans) == 1 for one in seen.workers), "a single plan again", serving=True
        )
        await seen.until(lambda: not seen.controller.replica.state.plans, "no sets in the state")
        tried = len([request for request in seen.workers[1].reloads if request.also])
        await seen.serve(30)
        assert len([request for request in seen.workers[1].reloads if request.also]) == tried
        failures = await seen.decisions(Trigger.FAILURE)
        assert failures


async def test_a_worker_that_refuses_its_router_does_not_stop_the_others(redis_url: str) -> None:
    async with scene(redis_url) as seen:
        seen.workers[0].refuses_routers = True
        await seen.until(
            lambda: bool(seen.workers[1].routers), "the router at the other worker", serving=True
        )
        await seen.until(
            lambda: any("a refused router" in problem for problem in seen.controller.problems()),
            "the problem",
        )
        assert not seen.workers[0].routers


async def test_a_worker_that_comes_back_without_its_router_gets_it_again(redis_url: str) -> None:
    async with scene(redis_url) as seen:
        await seen.until_routed()
        seen.workers[1].telemetry.router_number = 0
        await seen.until(lambda: seen.workers[1].telemetry.router_number > 0, "the router")


async def test_a_spoilt_router_in_redis_is_set_aside_and_learnt_anew(redis_url: str) -> None:
    async with redis_client.connect(redis_url) as redis:
        await redis.set(ROUTER, '{"version": 99}')
    async with scene(redis_url) as seen:
        await seen.until_routed()
        assert Router.from_json(await seen.redis.get(ROUTER) or b"").number >= 1
        assert not any("set aside" in problem for problem in seen.controller.problems())


async def test_workers_go_on_with_their_sets_when_a_controller_takes_over(redis_url: str) -> None:
    async with scene(redis_url) as seen:
        await seen.until_routed()
        number = seen.workers[0].telemetry.router_number
        kept = json.loads(await seen.redis.hget(CONTROLLER_STATE, "state") or "")
        assert set(kept["plans"]) == {EVERY_WORKER}
    async with redis_client.connect(redis_url) as redis:
        by_model = await examples.read(redis, MODELS)
        assert min(map(len, by_model.values())) >= 24
    async with scene(redis_url) as seen:
        # These are other workers, which start with a single plan. No request finishes until they have sets.
        await seen.until(
            lambda: all(one.plans == ALL and one.telemetry.router_number > number for one in seen.workers),
            "the sets and a newer router",
        )
        assert [one.entry.decision.trigger for one in await seen.decisions()][-1] is Trigger.START


async def test_the_setting_single_is_the_papers_method(redis_url: str) -> None:
    async with redis_client.connect(redis_url) as redis:
        for model in MODELS:
            found = [model_example(kind, number, model) for number in range(40) for kind in MODELS]
            await examples.append(redis, model, found, 1000)
        await redis.set(ROUTER, '{"version": 99}')
    async with scene(redis_url, routing="single") as seen:
        seen.workers[1].telemetry.router_number = 3
        await seen.until(lambda: seen.workers[1].telemetry.router_number == 0, "the router to be taken away")
        await seen.serve(40)
        await seen.controller.operator.set_slo(Slo(Objective.LATENCY))
        (decided,) = await seen.decisions(Trigger.SLO)
        assert "one plan for all" not in decided.entry.decision.reason
        assert not await seen.decisions(Trigger.ROUTING)
        assert not any(one.for_router for one in seen.profiler.evaluated)
        assert all(len(one.plans) == 1 for one in seen.workers)
        assert seen.controller.routing.state() is None
        assert await seen.redis.get(ROUTER) is None


async def test_each_worker_gets_what_its_memory_holds(redis_url: str) -> None:
    # Weights are 1 MB a layer: `c` holds one model of 12 layers with KV.
    async with scene(redis_url, memory=(MEMORY, 14_000_000)) as seen:
        await seen.until(
            lambda: seen.workers[0].plans == ALL and len({one.model for one in seen.workers[1].plans}) == 1,
            "sets by memory",
            serving=True,
        )
        assert max(one.depth for one in seen.workers[1].plans) == DEPTHS[-1]


@pytest.mark.parametrize("mode", ["advisory", "off"])
async def test_advice_moves_no_worker(redis_url: str, mode: str) -> None:
    async with scene(redis_url, mode=mode) as seen:
        await seen.serve(120)
        assert not any(one.reloads or one.routers for one in seen.workers)
