"""A worker's service over an engine whose plans and probes the test decides, through a real socket."""

import json
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import grpc
import pytest
from google.rpc import status_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from helios import history, redis_client, telemetry
from helios.client import error_from, error_of
from helios.engine.interface import ServedPrompt
from helios.errors import HeliosError, InvalidRequestError, PlanNotServedError, UnknownModelError
from helios.redis_schema import CONTROLLER_LEADER, CONTROLLER_STATE, ROUTER
from helios.routing.probe import ExitReading, Probe
from helios.routing.ranked_plan import RankedPlan
from helios.routing.router import Router
from helios.routing.unlike_prompts import UnlikePrompts
from helios.served import ServedPlan
from helios.slo import Objective
from helios.v1 import controller_pb2, generation_pb2, worker_pb2, worker_pb2_grpc
from services.worker import first_plan, first_router
from services.worker.__main__ import _load_further
from services.worker.first_plan import FirstPlan, LoadedPlan, PlanFile
from services.worker.service import WorkerService
from services.worker.settings import WorkerSettings
from tests.profiles import THRESHOLD, exit_profile, model_profile
from tests.scripted_engine import ScriptedEngine

TINY_1, TINY_2, TINY_4 = (ServedPlan(model="tiny", depth=depth) for depth in (1, 2, 4))
OTHER_2 = ServedPlan(model="other", depth=2)
READING = ExitReading(depth=1, tokens=8, nats=3.5, doubt=1.5)
PROBE = Probe(prompt_tokens=40, readings={"tiny": READING}, first_ids=(2, 9, 400))


class ScriptedRouter:
    """Ranks plans in a fixed order from all readings, and keeps what it was asked for."""

    def __init__(self, *plans: ServedPlan, number: int = 7) -> None:
        self.number = number
        self.asked: list[tuple[Probe, float | None, Objective | None]] = []
        self.lots: list[float] = []
        self._plans = plans

    def first_model(self, first_ids: Sequence[int]) -> str:
        assert first_ids
        return self._plans[0].model

    def rank(
        self,
        probe: Probe,
        *,
        lot: float,
        is_complete: bool,
        max_perplexity_increase: float | None = None,
        objective: Objective | None = None,
        among: Collection[ServedPlan] | None = None,
        unlike: UnlikePrompts | None = None,
    ) -> list[RankedPlan] | None:
        if not is_complete:
            return None
        self.lots.append(lot)
        self.asked.append((probe, max_perplexity_increase, objective))
        return [
            RankedPlan(
                plan=plan,
                extra_seconds_per_token=float(place),
                expected_perplexity_increase=plan.depth / 100,
                reason=f"{plan} was ranked",
            )
            for place, plan in enumerate(self._plans)
            if among is None or plan in among
        ]


@asynccontextmanager
async def served(
    engine: ScriptedEngine,
    models_dir: Path,
    router: ScriptedRouter | None = None,
    plan_file: Path | None = None,
) -> "AsyncIterator[worker_pb2_grpc.WorkerServiceAsyncStub]":
    """A connection to a worker with this engine and router."""
    service = WorkerService(
        engine,
        WorkerSettings(),
        models_dir,
        "w",
        PlanFile(plan_file, TINY_4),
        cast(Router | None, router),
    )
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield worker_pb2_grpc.WorkerServiceStub(channel)
    await server.stop(None)


def request(**fields: object) -> worker_pb2.WorkerServiceGenerateRequest:
    sampling = generation_pb2.SamplingParams(max_tokens=3, seed=1)
    message = worker_pb2.WorkerServiceGenerateRequest(prompt_ids=[2, 7], sampling=sampling)
    message.MergeFrom(worker_pb2.WorkerServiceGenerateRequest(**fields))  # type: ignore[arg-type]
    return message


async def ended(
    stub: "worker_pb2_grpc.WorkerServiceAsyncStub",
    sent: worker_pb2.WorkerServiceGenerateRequest,
    *,
    many: bool,
) -> worker_pb2.WorkerServiceGenerateResponse:
    """The last message of the stream, through either call. Raises the error with which it ends."""
    if not many:
        try:
            return [response async for response in stub.Generate(sent)][-1]
        except grpc.aio.AioRpcError as error:
            raise error_from(error, "w") from error
    call = stub.GenerateMany()
    await call.write(worker_pb2.GenerateManyRequest(start=worker_pb2.SequenceStart(sequence=5, request=sent)))
    try:
        while True:
            response = cast(worker_pb2.GenerateManyResponse, await call.read())
            for output in response.outputs:
                assert output.sequence == 5
                if output.HasField("status"):
                    raise error_of(status_pb2.Status.FromString(output.status))
                if not output.response.HasField("chunk"):
                    return output.response
    finally:
        call.cancel()


CALLS = pytest.mark.parametrize("many", [False, True])


@CALLS
async def test_a_request_is_served_under_the_plan_that_it_names(tiny_models: Path, many: bool) -> None:
    engine = ScriptedEngine(TINY_4, TINY_2, OTHER_2, probe=PROBE)
    async with served(engine, tiny_models, ScriptedRouter(TINY_4)) as stub:
        for fields, plan in (
            ({}, TINY_4),
            ({"depth": 2}, TINY_2),
            ({"model": "tiny"}, TINY_4),
            ({"model": "other"}, OTHER_2),
            ({"model": "other", "depth": 2}, OTHER_2),
        ):
            finish = (await ended(stub, request(**fields), many=many)).finish
            assert (finish.model, finish.depth) == (plan.model, plan.depth)
            assert not finish.HasField("expected_perplexity_increase")
            assert finish.plan_reason == ""


@CALLS
@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"depth": 3}, PlanNotServedError, "any model at depth 3 is not served here"),
        ({"model": "other", "depth": 4}, PlanNotServedError, "served: other at depth 2"),
        ({"model": "nobody"}, UnknownModelError, "'tiny', 'other' are"),
        ({"depth": 2, "route": worker_pb2.Route()}, InvalidRequestError, "both depth and route"),
        (
            {"route": worker_pb2.Route(max_perplexity_increase=float("nan"))},
            InvalidRequestError,
            "max_perplexity_increase must be",
        ),
        (
            {"route": worker_pb2.Route(objective=controller_pb2.OBJECTIVE_ENERGY)},
            InvalidRequestError,
            "throughput or latency",
        ),
    ],
)
async def test_a_plan_or_route_that_cannot_be_is_refused_with_the_reason(
    tiny_models: Path, many: bool, fields: dict[str, object], error: type[HeliosError], said: str
) -> None:
    engine = ScriptedEngine(TINY_4, OTHER_2, probe=PROBE)
    async with served(engine, tiny_models, ScriptedRouter(TINY_4)) as stub:
        with pytest.raises(error, match=said):
            await ended(stub, request(**fields), many=many)


@CALLS
async def test_the_router_chooses_the_plan_and_the_finish_says_why(tiny_models: Path, many: bool) -> None:
    router, engine = ScriptedRouter(TINY_2, TINY_4), ScriptedEngine(TINY_4, TINY_2, probe=PROBE)
    async with served(engine, tiny_models, router) as stub:
        route = worker_pb2.Route(max_perplexity_increase=0.02, objective=controller_pb2.OBJECTIVE_LATENCY)
        finish = (await ended(stub, request(route=route), many=many)).finish
    assert (finish.model, finish.depth) == ("tiny", 2)
    assert finish.expected_perplexity_increase == 0.02
    assert finish.plan_reason == "tiny at depth 2 was ranked"
    assert router.asked == [(PROBE, 0.02, Objective.LATENCY)]
    assert engine.probed_first == ["tiny"]


@CALLS
async def test_a_request_whose_best_plan_is_in_force_elsewhere_is_redirected(
    tiny_models: Path, many: bool
) -> None:
    router = ScriptedRouter(OTHER_2, TINY_4)
    async with served(ScriptedEngine(TINY_4, probe=PROBE), tiny_models, router) as stub:
        response = await ended(stub, request(route=worker_pb2.Route()), many=many)
    plans = response.redirect.plans
    assert [(one.plan.model, one.plan.depth) for one in plans] == [("other", 2), ("tiny", 4)]
    assert [one.extra_seconds_per_token for one in plans] == [0.0, 1.0]
    assert [one.expected_perplexity_increase for one in plans] == [0.02, 0.04]
    assert plans[0].reason == "other at depth 2 was ranked"


async def test_a_request_has_the_same_lot_whenever_it_is_sent_and_others_have_others(
    tiny_models: Path,
) -> None:
    router = ScriptedRouter(TINY_4)
    for _ in range(2):
        async with served(ScriptedEngine(TINY_4, probe=PROBE), tiny_models, router) as stub:
            for number in range(50):
                asked = request(route=worker_pb2.Route(), request_id=f"request-{number}")
                await ended(stub, asked, many=True)
    assert router.lots[:50] == router.lots[50:]
    assert {int(5 * lot) for lot in router.lots} == set(range(5))


async def test_a_request_that_names_a_model_is_routed_among_its_plans(tiny_models: Path) -> None:
    router = ScriptedRouter(OTHER_2, TINY_1, TINY_4)
    async with served(ScriptedEngine(TINY_4, OTHER_2, probe=PROBE), tiny_models, router) as stub:
        response = await ended(stub, request(model="tiny", route=worker_pb2.Route()), many=True)
    plans = response.redirect.plans
    assert [(one.plan.model, one.plan.depth) for one in plans] == [("tiny", 1), ("tiny", 4)]


async def test_a_span_tells_the_plan_what_was_expected_of_it_and_when_it_was_chosen(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    engine = ScriptedEngine(TINY_4, TINY_2, probe=PROBE)
    for router in (ScriptedRouter(TINY_2), ScriptedRouter(OTHER_2)):
        async with served(engine, tiny_models, router) as stub:
            await ended(stub, request(route=worker_pb2.Route()), many=False)
    spans = exporter.get_finished_spans()
    chosen, redirected = (dict(span.attributes or {}) for span in spans if span.name == "Generate")
    assert (chosen["helios.model"], chosen["helios.depth"]) == ("tiny", 2)
    assert chosen["helios.expected_perplexity_increase"] == 0.02
    assert chosen["helios.plan_reason"] == "tiny at depth 2 was ranked"
    assert (chosen["helios.redirected"], redirected["helios.redirected"]) == (False, True)
    assert "helios.depth" not in redirected
    probes = [span for span in spans if span.name == "probe"]
    assert len(probes) == 2
    assert all(span.start_time <= span.end_time for span in probes)


async def test_without_a_router_the_first_plan_serves(tiny_models: Path) -> None:
    async with served(ScriptedEngine(TINY_4, OTHER_2, probe=PROBE), tiny_models) as stub:
        finish = (await ended(stub, request(route=worker_pb2.Route()), many=True)).finish
        assert (finish.model, finish.depth, finish.plan_reason) == ("tiny", 4, "")
        bound = worker_pb2.Route(max_perplexity_increase=0.0)
        finish = (await ended(stub, request(route=bound), many=True)).finish
    assert (finish.model, finish.depth) == ("tiny", 4)
    assert "was not applied" in finish.plan_reason


async def test_a_request_that_goes_on_is_not_routed_again(tiny_models: Path) -> None:
    router = ScriptedRouter(OTHER_2)
    async with served(ScriptedEngine(TINY_4, TINY_2, probe=PROBE), tiny_models, router) as stub:
        fields = {"emitted_ids": [100], "model": "tiny", "depth": 2}
        finish = (await ended(stub, request(**fields), many=True)).finish
        assert (finish.model, finish.depth, finish.completion_tokens) == ("tiny", 2, 3)
        await ended(stub, request(emitted_ids=[100], route=worker_pb2.Route()), many=True)
    assert router.asked == []


async def test_a_router_that_is_broken_is_refused_and_the_one_before_it_stays(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_json(data: bytes) -> ScriptedRouter:
        if data != b"good":
            raise InvalidRequestError("no router")
        return ScriptedRouter(TINY_2, number=8)

    monkeypatch.setattr(Router, "from_json", from_json)
    async with served(ScriptedEngine(TINY_4, TINY_2, probe=PROBE), tiny_models) as stub:
        watch = stub.WatchTelemetry(worker_pb2.WatchTelemetryRequest(interval_seconds=60))
        messages = aiter(watch)
        assert (await anext(messages)).telemetry.router_number == 0
        await stub.SetRouter(worker_pb2.SetRouterRequest(router=b"good"))
        assert (await anext(messages)).telemetry.router_number == 8, "it is told at once"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.SetRouter(worker_pb2.SetRouterRequest(router=b"bad"))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        status = await stub.GetStatus(worker_pb2.GetStatusRequest())
        assert status.telemetry.router_number == 8
        finish = (await ended(stub, request(route=worker_pb2.Route()), many=True)).finish
        assert finish.depth == 2


async def test_a_reload_puts_a_set_in_force_that_outlives_the_process(
    tiny_models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    reload = worker_pb2.ReloadRequest(model="tiny", depth=2, threshold=0.25)
    reload.also.add(model="other", depth=2, threshold=0.5, share=0.25)
    reload.also.add(model="tiny")
    engine = ScriptedEngine(TINY_4, probe=PROBE)
    async with served(engine, tiny_models, plan_file=path) as stub:
        async for _ in stub.Reload(reload):
            pass
        status = await stub.GetStatus(worker_pb2.GetStatusRequest())
    plans = [("tiny", 2), ("other", 2), ("tiny", 4)]
    assert [(one.model, one.depth) for one in status.plans] == plans
    told = [(one.plan.model, one.plan.depth, one.running) for one in status.telemetry.plans]
    assert told == [(model, depth, number) for number, (model, depth) in enumerate(plans)]

    kept = PlanFile(path, TINY_4).read()
    assert kept is not None
    again = ScriptedEngine(kept.plan, probe=PROBE)
    _load_further(again, tiny_models, kept)
    assert again.plans == engine.plans == (TINY_2, OTHER_2, TINY_4)
    assert again.thresholds == engine.thresholds == [0.25, 0.5, None]
    assert again.shares == engine.shares == [1.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("also", "said"),
    [
        ({"model": "tiny", "depth": 2}, "tiny at depth 2 is named more than once"),
        ({"model": "nobody", "depth": 2}, "no model 'nobody'"),
        ({"model": "other", "threshold": 2.0}, "threshold must be in"),
        ({"model": "other", "share": 0.0}, "share must be"),
        ({"model": "other", "share": float("inf")}, "share must be"),
    ],
)
async def test_a_set_that_cannot_be_is_refused_and_the_plans_stay(
    tiny_models: Path, tmp_path: Path, also: dict[str, object], said: str
) -> None:
    reload = worker_pb2.ReloadRequest(model="tiny", depth=2)
    reload.also.add(**also)  # type: ignore[arg-type]
    engine = ScriptedEngine(TINY_4, OTHER_2, probe=PROBE)
    async with served(engine, tiny_models, plan_file=tmp_path / "plan.json") as stub:
        with pytest.raises(grpc.aio.AioRpcError, match=said):
            async for _ in stub.Reload(reload):
                pass
    assert engine.plans == (TINY_4, OTHER_2)
    assert PlanFile(tmp_path / "plan.json", TINY_4).read() is None


async def test_further_plans_that_cannot_be_loaded_leave_the_first_one_serving(tiny_models: Path) -> None:
    engine = ScriptedEngine(TINY_4, probe=PROBE)
    gone = LoadedPlan(plan=ServedPlan(model="nobody", depth=2), threshold=None)
    _load_further(engine, tiny_models, FirstPlan(TINY_4, None, "a test", (gone,)))
    assert engine.plans == (TINY_4,)


async def test_a_watcher_that_asks_gets_each_served_prompt_once(tiny_models: Path) -> None:
    engine = ScriptedEngine(TINY_4, probe=PROBE)
    engine.add_prompt(ServedPrompt(0, TINY_4, PROBE, tokens=16, nats=48.5))
    async with served(engine, tiny_models) as stub:
        asking = worker_pb2.WatchTelemetryRequest(interval_seconds=0.05, served_prompts=True)
        watch = aiter(stub.WatchTelemetry(asking))
        (prompt,) = (await anext(watch)).served_prompts
        assert (prompt.plan.model, prompt.plan.depth, prompt.prompt_tokens) == ("tiny", 4, 40)
        assert (prompt.tokens, prompt.nats) == (16, 48.5)
        (reading,) = prompt.readings
        assert (reading.model, reading.depth, reading.tokens) == ("tiny", 1, 8)
        assert (reading.nats, reading.doubt) == (3.5, 1.5)
        assert list(prompt.first_ids) == [2, 9, 400]
        assert not (await anext(watch)).served_prompts
        engine.add_prompt(ServedPrompt(0, TINY_2, PROBE, tokens=16, nats=1.0))
        seen = []
        while not seen:
            seen = list((await anext(watch)).served_prompts)
        assert [one.plan.depth for one in seen] == [2]
        others = aiter(stub.WatchTelemetry(worker_pb2.WatchTelemetryRequest(interval_seconds=0.05)))
        assert not (await anext(others)).served_prompts


async def test_a_worker_starts_with_the_set_that_redis_names(redis_url: str, tmp_path: Path) -> None:
    plan_file = PlanFile(tmp_path / "plan.json", TINY_4)
    plan_file.write(TINY_2, None, (LoadedPlan(plan=OTHER_2, threshold=0.5),))
    async with redis_client.connect(redis_url) as redis:
        await history.write(redis, model_profile("other", [exit_profile(2, 0.9), exit_profile(4, 0.9)]))
        in_set = [{"model": "tiny", "depth": 4}, {"model": "other", "depth": 2}]
        state: dict[str, object] = {"plan": {"model": "tiny", "depth": 4}, "plans": {"": in_set}}

        async def found() -> FirstPlan:
            await redis.hset(CONTROLLER_STATE, mapping={"state": json.dumps(state), "mode": "active"})
            plan = await first_plan.find(redis_url, "w", plan_file)
            assert plan is not None
            return plan

        await redis.set(CONTROLLER_LEADER, "somebody")
        first = await found()
        assert first.plan == TINY_4
        assert first.also == (LoadedPlan(plan=OTHER_2, threshold=THRESHOLD),), "as calibrated"
        state["pins"] = {"w": {"model": "tiny", "depth": 2}}
        assert ((await found()).plan, (await found()).also) == (TINY_2, ()), "a pin is a single plan"


async def test_a_plan_file_of_an_earlier_version_names_one_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    kept = {"plan": {"model": "tiny", "depth": 2}, "threshold": 0.5, "flags": {"model": "tiny", "depth": 4}}
    path.write_text(json.dumps(kept))
    assert PlanFile(path, TINY_4).read() == FirstPlan(TINY_2, 0.5, "was served before the restart")


async def test_a_worker_starts_with_the_last_router_and_without_a_spoilt_one(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await first_router.find(None) is None
    assert await first_router.find(redis_url) is None
    async with redis_client.connect(redis_url) as redis:
        await redis.set(ROUTER, "not a router")
        assert await first_router.find(redis_url) is None
        await redis.delete(ROUTER)
        await redis.lpush(ROUTER, "of another type")
        assert await first_router.find(redis_url) is None
        await redis.delete(ROUTER)
        last = ScriptedRouter(TINY_2)
        monkeypatch.setattr(Router, "from_json", lambda data: last if data == b"good" else None)
        await redis.set(ROUTER, "good")
        assert cast(ScriptedRouter | None, await first_router.find(redis_url)) is last
    monkeypatch.undo()
    assert await first_router.find("redis://127.0.0.1:1/0") is None
