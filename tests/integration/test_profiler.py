"""A profiler process beside real gateways, workers and Redis."""

import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from redis.asyncio import Redis
from tokenizers import Tokenizer

from helios import catalog, examples, history, prompts
from helios.client import AsyncClient, generate_request
from helios.engine.tokenizer import load_tokenizer
from helios.footprint import activation_bytes, kv_bytes_per_token, model_bytes
from helios.modes import Precision
from helios.redis_schema import DECISIONS, EXAMPLES_PREFIX, PROFILE_PREFIX, PROMPTS
from helios.routing.example import joined
from helios.v1 import generation_pb2, profiler_pb2, profiler_pb2_grpc
from tests.opt_variants import byte_tokenizer, save_variant
from tests.stack import EXIT_LAYERS, Process, Stack, free_port
from tests.streams import stream, until

Stub = profiler_pb2_grpc.ProfilerServiceStub
Evaluated = tuple[
    list[profiler_pb2.EvaluationProgress], list[profiler_pb2.ModelProfile], grpc.aio.AioRpcError | None
]
TIMEOUT = 120.0
SHORT = generation_pb2.SamplingParams(max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, `other`, and `broken`, whose weights are cut off."""
    directory = tmp_path_factory.mktemp("with-broken") / "models"
    for name in ("tiny", "other"):
        shutil.copytree(tiny_models / name, directory / name)
    shutil.copytree(directory / "tiny", directory / "broken")
    weights = directory / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return directory


@pytest.fixture(scope="module")
def profiled_stack(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Redis and a profiler (the last process). Tests must not harm it."""
    parts = Stack(tmp_path_factory.mktemp("profiled"), models)
    try:
        parts.start_redis()
        parts.start_profiler(max_waiting=0)
        yield parts
    finally:
        parts.close()


@pytest.fixture
def profiler(profiled_stack: Stack) -> Process:
    return profiled_stack.processes[1]


@pytest.fixture
async def redis(profiled_stack: Stack) -> AsyncIterator[Redis]:
    """The stack's Redis, empty."""
    async with Redis.from_url(profiled_stack.redis_url) as connection:
        await connection.flushall()
        yield connection


@pytest.fixture
async def stub(profiler: Process) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(profiler.address) as channel:
        yield Stub(channel)


async def evaluate(
    stub: Stub, models: Sequence[str], requests: int | None = None, **fields: Any
) -> Evaluated:
    """Returns progress, results, and the error with which the call ended."""
    progress, results = [], []
    try:
        async for response in stub.Evaluate(
            profiler_pb2.EvaluateRequest(models=models, requests=requests, **fields), timeout=TIMEOUT
        ):
            if response.HasField("progress"):
                progress.append(response.progress)
            else:
                results.append(response.result)
    except grpc.aio.AioRpcError as error:
        return progress, results, error
    return progress, results, None


async def test_results_are_sent_and_kept_in_redis(stub: Stub, redis: Redis) -> None:
    progress, results, error = await evaluate(stub, ["tiny", "other"], requests=3)
    assert error is None
    assert [(one.model, one.requests_done, one.requests_total) for one in progress] == [
        (name, done, 3) for name in ("tiny", "other") for done in range(4)
    ]
    assert [result.model for result in results] == ["tiny", "other"]
    for result in results:
        assert tuple(one.depth for one in result.exits) == EXIT_LAYERS
        assert sum(result.exits[-1].confidence_counts) == result.tokens
        assert result.exits[-1].confidence_counts == result.exits[-1].agreement_counts
        assert result.provenance["prompts"] == "bundled"
        assert result.cpu_seconds > 0
        weight_bytes = [one.weight_bytes for one in result.exits]
        assert weight_bytes == sorted(set(weight_bytes))
    table, ignored = await history.read(redis)
    assert not ignored
    assert {name: profile.time for name, profile in table.items()} == {
        result.model: result.time for result in results
    }
    kept = await stub.GetHistory(profiler_pb2.GetHistoryRequest())
    assert sorted(kept.profiles, key=str) == sorted(results, key=str)
    kept = await stub.GetHistory(profiler_pb2.GetHistoryRequest(models=["tiny", "nobody"]))
    assert [profile.model for profile in kept.profiles] == ["tiny"]


async def test_without_names_the_shortlist_is_evaluated(stub: Stub, redis: Redis) -> None:
    _, results, error = await evaluate(stub, [], requests=1)
    # The catalog cannot know that the weights of `broken` are cut off.
    assert error is not None
    assert {result.model for result in results} == {"tiny", "other"}


@pytest.mark.parametrize("short_of", [0, 1])
async def test_profiler_and_controller_shortlist_the_same_models_near_the_budget(
    stack: Stack, short_of: int
) -> None:
    """short_of: how many bytes the budget is too small for `long`, the model that needs the most."""
    entry = catalog.read_model(stack.models_dir / "long")
    kv_bytes = entry.context_tokens * kv_bytes_per_token(entry.config, entry.num_layers, Precision.INT8)
    budget = model_bytes(entry, Precision.INT8) + kv_bytes - short_of
    stack.start_redis()
    # A worker's budget includes activations. They have the same size in all of these models.
    stack.start_worker(
        precision=Precision.INT8,
        memory_bytes=budget + activation_bytes(entry.config, 4, 64, 2),
        max_running=2,
        step_token_budget=64,
    )
    profiler = stack.start_profiler(precision=Precision.INT8, memory_bytes=budget)
    stack.start_controller(mode="advisory", profiler=profiler.address, models_dir=stack.models_dir)
    expected = {"tiny", "other"} if short_of else {"tiny", "other", "long"}
    async with Redis.from_url(stack.redis_url) as redis:

        async def has_decided() -> bool:
            return bool(await redis.exists(DECISIONS))

        # The controller decides once its shortlisted models are evaluated.
        await until(has_decided, "the controller's first decision", seconds=60)
        assert set((await history.read(redis))[0]) == expected
    async with grpc.aio.insecure_channel(profiler.address) as channel:
        _, results, error = await evaluate(Stub(channel), [], requests=1)
    assert error is None
    assert {result.model for result in results} == expected


async def test_prompts_that_a_gateway_sampled_are_what_is_evaluated(
    profiled_stack: Stack,
    stub: Stub,
    redis: Redis,
    models: Path,
) -> None:
    worker = profiled_stack.start_worker()
    silent = profiled_stack.start_gateway([worker.address], prompt_share=0)
    sampling = profiled_stack.start_gateway([worker.address])
    texts = [f"The usage of argument number {index} is shown here." for index in range(3)]
    async with AsyncClient(silent.address) as client:
        await stream(client, generate_request("not to be sampled", sampling=SHORT))
    async with AsyncClient(sampling.address) as client:
        for text in texts:
            await stream(client, generate_request(text, sampling=SHORT))

    async def sampled() -> bool:
        return int(await redis.xlen(PROMPTS)) >= len(texts)

    await until(sampled, "the prompts to be in Redis")
    tokenizer = Tokenizer.from_file(str(models / "tiny" / "tokenizer.json"))
    _, (result,), error = await evaluate(stub, ["tiny"], requests=5)
    assert error is None
    assert result.provenance["prompts"] == "recent"
    assert result.requests == len(texts)
    predicted = [tokenizer.encode(text).ids[1:] for text in texts]
    text_bytes = sum(len(text) for text in texts)
    assert result.bytes_per_token == pytest.approx(text_bytes / sum(map(len, predicted)))
    (newest,), _ = await prompts.recent(redis, {result.tokenizer_id}, 1)
    assert tokenizer.decode(list(newest.ids)) == texts[-1]


async def test_prompts_of_another_tokenizer_are_evaluated_as_the_same_text(
    stack: Stack, models: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "models"
    shutil.copytree(models / "tiny", directory / "tiny")
    byte_level = directory / "byte-level"
    save_variant(byte_level, "pre-norm", 3, exits=(2, 6))
    stack.start_redis()
    profiler = stack.start_profiler(models_dir=directory)
    text = "parse the arguments of the command line"
    tokenizer = Tokenizer.from_file(str(directory / "tiny" / "tokenizer.json"))
    async with (
        Redis.from_url(stack.redis_url) as redis,
        grpc.aio.insecure_channel(profiler.address) as channel,
    ):
        stub = Stub(channel)
        _, (before,), _ = await evaluate(stub, ["tiny"], requests=1)
        ids = tuple(tokenizer.encode(text).ids)
        await prompts.write(redis, [prompts.RecentPrompt(before.tokenizer_id, ids)], 10, 60)
        _, results, error = await evaluate(stub, ["tiny", "byte-level"])
    assert error is None
    tiny, other = results
    assert tiny.bytes_per_token * (len(ids) - 1) == pytest.approx(len(text))
    assert other.bytes_per_token == pytest.approx(1)
    assert other.tokens >= len(byte_tokenizer().encode(text).ids)


async def test_speeds_outlive_the_profiler_and_are_measured_anew_when_asked(
    profiled_stack: Stack, stub: Stub, redis: Redis, models: Path
) -> None:
    _, (first,), _ = await evaluate(stub, ["tiny"], requests=1)
    _, (again,), _ = await evaluate(stub, ["tiny"], requests=1)
    assert again.provenance["timed_at"] == first.provenance["timed_at"]
    # The model is already loaded and timed.
    assert again.once_cpu_seconds < first.once_cpu_seconds
    another = profiled_stack.start_profiler()
    async with grpc.aio.insecure_channel(another.address) as channel:
        _, (elsewhere,), _ = await evaluate(Stub(channel), ["tiny"], requests=1)
        assert elsewhere.provenance["timed_at"] == first.provenance["timed_at"]
        anew = profiler_pb2.EvaluateRequest(models=["tiny"], requests=1, remeasure=True)
        results = [one.result async for one in Stub(channel).Evaluate(anew) if one.HasField("result")]
    assert results[0].provenance["timed_at"] != first.provenance["timed_at"]


async def test_requests_of_several_evaluations_are_pooled_while_the_traffic_stays(
    stub: Stub, redis: Redis
) -> None:
    _, (bundled,), _ = await evaluate(stub, ["tiny"], requests=1)
    dice = random.Random(1)
    found = []
    for _ in range(2):
        recent = [
            prompts.RecentPrompt(bundled.tokenizer_id, (2, *(dice.randrange(4, 260) for _ in range(30))))
            for _ in range(5)
        ]
        await prompts.write(redis, recent, 250, 60)
        _, (result,), _ = await evaluate(stub, ["tiny"])
        found.append(result)
    assert [result.requests for result in found] == [5, 10]
    assert found[1].samples[:5] == found[0].samples
    assert found[1].tokens > found[0].tokens


async def test_an_unknown_model_is_refused_naming_the_available_ones(
    stub: Stub,
) -> None:
    _, results, error = await evaluate(stub, ["tiny", "nobody"])
    assert error is not None
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "available: broken, other, tiny" in (error.details() or "")
    assert not results


async def test_a_broken_checkpoint_is_named_and_does_not_stop_the_others(stub: Stub, redis: Redis) -> None:
    _, results, error = await evaluate(stub, ["broken", "tiny"], requests=1)
    assert [result.model for result in results] == ["tiny"]
    assert error is not None
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "broken/model.safetensors" in (error.details() or "")
    assert await redis.exists(PROFILE_PREFIX + "tiny")


async def test_one_evaluation_at_a_time_and_a_cancelled_one_makes_room(stub: Stub, redis: Redis) -> None:
    long_prompt = (2, *range(50, 250))
    _, (first,), _ = await evaluate(stub, ["tiny"], requests=1)
    await prompts.write(redis, [prompts.RecentPrompt(first.tokenizer_id, long_prompt)] * 250, 250, 60)
    running = stub.Evaluate(profiler_pb2.EvaluateRequest(models=["tiny"], requests=250), timeout=TIMEOUT)
    await running.read()
    _, _, error = await evaluate(stub, ["other"], requests=1)
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["retry-after-ms"]
    running.cancel()

    async def served() -> bool:
        _, results, _ = await evaluate(stub, ["other"], requests=1)
        return len(results) == 1

    await until(served, "the next evaluation to be served", seconds=60)
    # The cancelled evaluation left nothing.
    assert (await history.read(redis))[0]["tiny"].requests == 1


async def test_history_of_another_version_or_of_a_model_that_is_gone_is_ignored_and_said(
    stub: Stub, redis: Redis, profiler: Process
) -> None:
    await evaluate(stub, ["tiny"], requests=1)
    document = (await history.read(redis))[0]["tiny"]
    await history.write(redis, document.model_copy(update={"model": "departed"}))
    await redis.set(PROFILE_PREFIX + "other", '{"of": "another shape"}')
    await redis.set(PROFILE_PREFIX + "odd", "not json")
    await redis.hset(PROFILE_PREFIX + "hash", "a", "b")
    await redis.set("helios:v0:profile:tiny", "{}")
    newer = json.loads(await redis.get(PROFILE_PREFIX + "tiny") or "")
    newer["exits"][0]["colour"] = newer["weather"] = "fine"
    await redis.set(PROFILE_PREFIX + "tiny", json.dumps(newer))
    for _ in range(2):
        kept = await stub.GetHistory(profiler_pb2.GetHistoryRequest())
        assert [profile.model for profile in kept.profiles] == ["tiny"]
    for said in (
        "departed is ignored: the model is gone",
        "profile:other is ignored: not a profile",
        "profile:odd is ignored: not a profile",
        "profile:hash is ignored: it cannot be read",
        "v0:profile:tiny is ignored: written by",
    ):
        assert profiler.log.count(said) == 1


async def test_evaluations_stand_back_behind_serving_but_for_those_after_a_drift(
    profiler: Process, stub: Stub
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    back = min(own + 10, 19)

    def niceness() -> list[int]:
        threads = Path(f"/proc/{profiler.process.pid}/task").iterdir()
        return [os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads]

    await evaluate(stub, ["tiny"], requests=1)
    assert niceness().count(back) == 1
    before = len(niceness())
    await evaluate(stub, ["tiny"], requests=1, fresh=True)
    # Only the thread of the evaluation after a drift has normal priority.
    assert (len(niceness()), niceness().count(back)) == (before + 1, 1)


async def test_a_fresh_evaluation_counts_a_few_earlier_requests_that_are_alike(
    stub: Stub, redis: Redis
) -> None:
    _, (bundled,), _ = await evaluate(stub, ["tiny"], requests=1)
    dice = random.Random(0)
    for counted in (8, 12, 12):
        ids = [(2, *dice.choices(range(10, 300), k=40)) for _ in range(8)]
        recent = [prompts.RecentPrompt(bundled.tokenizer_id, one) for one in ids]
        await prompts.write(redis, recent, 250, 60)
        _, (result,), _ = await evaluate(stub, ["tiny"], requests=8, fresh=True)
        assert result.requests == counted


async def test_a_fresh_evaluation_takes_only_the_youngest_prompts(stub: Stub, redis: Redis) -> None:
    _, (bundled,), _ = await evaluate(stub, ["tiny"], requests=1)

    async def write(first: int) -> None:
        ids = [(2, *range(first + number, first + number + 30)) for number in range(3)]
        recent = [prompts.RecentPrompt(bundled.tokenizer_id, one) for one in ids]
        await prompts.write(redis, recent, 250, 60)

    await write(10)
    # Prompts' ages are measured by Redis's clock.
    seconds, microseconds = await redis.time()
    before = seconds + microseconds / 1e6
    while True:
        seconds, microseconds = await redis.time()
        if (age := seconds + microseconds / 1e6 - before) > 0.05:
            break
    await write(100)
    _, (result,), _ = await evaluate(stub, ["tiny"], requests=5, fresh=True, newest_seconds=age)
    assert (result.requests, len(result.samples)) == (3, 3)
    continued = result.tokens
    _, (result,), _ = await evaluate(
        stub, ["tiny"], requests=3, fresh=True, newest_seconds=60, prompts_only=True
    )
    assert (result.requests, result.tokens < continued) == (3, True)
    _, results, error = await evaluate(stub, ["tiny"], requests=5, fresh=True, newest_seconds=1e-9)
    assert not results
    assert error is not None
    assert "no prompt was sampled in the last" in (error.details() or "")


async def evaluate_for_router(
    stub: Stub, models: Sequence[str], **fields: Any
) -> tuple[list[profiler_pb2.RouterEvaluation], grpc.aio.AioRpcError | None]:
    """Returns the results, and the error with which the call ended."""
    results = []
    request = profiler_pb2.EvaluateRequest(models=models, for_router=True, **fields)
    try:
        async for response in stub.Evaluate(request, timeout=TIMEOUT):
            assert not response.HasField("result")
            if response.HasField("router_result"):
                results.append(response.router_result)
    except grpc.aio.AioRpcError as error:
        return results, error
    return results, None


async def write_prompts(redis: Redis, models: Path, ids: Sequence[tuple[int, ...]]) -> None:
    """Writes recent prompts of the tokenizer of `tiny`, which `other` shares."""
    tokenizer_id = load_tokenizer(models / "tiny", catalog.read_model(models / "tiny").facts).tokenizer_id
    await prompts.write(redis, [prompts.RecentPrompt(tokenizer_id, one) for one in ids], 250, 60)


async def test_an_evaluation_for_the_router_adds_examples_and_leaves_profiles_alone(
    stub: Stub, redis: Redis, models: Path
) -> None:
    sent = [(2, *range(first, first + 90)) for first in (10, 40, 70)]
    await write_prompts(redis, models, [*sent, (2, *range(100, 110))])
    results, error = await evaluate_for_router(stub, ["tiny", "other"], requests=4)
    assert error is None
    # The prompt of eleven tokens is too short to learn from.
    assert [(one.model, one.examples) for one in results] == [("tiny", 3), ("other", 3)]
    assert all(one.cpu_seconds > one.once_cpu_seconds for one in results)
    found = await examples.read(redis, ["tiny", "other"])
    for of_model in found.values():
        assert {one.ids for one in of_model} == set(sent)
        for one in of_model:
            assert (one.first_tokens, len(one.rest_nats)) == (32, len(EXIT_LAYERS))
    # Prompts have the same names under every model.
    assert {one.ids for one in joined(found)} == set(sent)
    assert not await redis.exists(PROFILE_PREFIX + "tiny", PROFILE_PREFIX + "other")
    # The models stay loaded, and the same prompts take no more room.
    results, _ = await evaluate_for_router(stub, ["tiny"], requests=4)
    assert [one.once_cpu_seconds for one in results] == [0]
    assert await redis.llen(EXAMPLES_PREFIX + "tiny") == 3


async def test_other_evaluations_add_no_examples(stub: Stub, redis: Redis) -> None:
    for fields in ({}, {"prompts_only": True}):
        _, results, _ = await evaluate(stub, ["tiny"], requests=1, **fields)
        assert len(results) == 1
    assert not await redis.exists(EXAMPLES_PREFIX + "tiny")


async def test_several_profilers_add_examples_and_the_newest_are_kept(
    profiled_stack: Stack, stub: Stub, redis: Redis, models: Path
) -> None:
    first, second = [[(2, *range(start, start + 130)) for start in starts] for starts in ((5, 6, 7), (8, 9))]
    await write_prompts(redis, models, first)
    await evaluate_for_router(stub, ["tiny"], requests=3)
    await write_prompts(redis, models, second)
    another = profiled_stack.start_profiler(examples_kept=4, probe_tokens=8, max_prompt_tokens=64)
    async with grpc.aio.insecure_channel(another.address) as channel:
        await evaluate_for_router(Stub(channel), ["tiny"], requests=2, fresh=True, newest_seconds=60)
    found = (await examples.read(redis, ["tiny"]))["tiny"]
    assert [(len(one.ids), one.first_tokens) for one in found] == [(131, 32), (131, 32), (64, 8), (64, 8)]
    assert {one.ids for one in found[2:]} == {one[:64] for one in second}


async def test_a_model_that_cannot_be_evaluated_for_the_router_does_not_stop_the_others(
    stub: Stub, redis: Redis
) -> None:
    results, error = await evaluate_for_router(stub, ["broken", "tiny"], requests=1)
    assert [one.model for one in results] == ["tiny"]
    assert error is not None
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert await redis.exists(EXAMPLES_PREFIX + "tiny")


async def test_it_answers_health_and_reflection(profiler: Process) -> None:
    with grpc.insecure_channel(profiler.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="helios.v1.ProfilerService"), timeout=TIMEOUT
        )
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert "helios.v1.ProfilerService" in names


async def test_without_redis_results_still_come_and_it_is_said_that_they_were_not_stored(
    stack: Stack, models: Path
) -> None:
    profiler = stack.start_profiler(models_dir=models, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    async with grpc.aio.insecure_channel(profiler.address) as channel:
        stub = Stub(channel)
        _, results, error = await evaluate(stub, ["tiny", "other"], requests=1)
        assert [result.model for result in results] == ["tiny", "other"]
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "tiny was evaluated but not stored" in (error.details() or "")
        for_router, error = await evaluate_for_router(stub, ["tiny"], requests=1)
        assert [one.model for one in for_router] == ["tiny"]
        assert error is not None
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "tiny was evaluated but not stored" in (error.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetHistory(profiler_pb2.GetHistoryRequest())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        running = stub.Evaluate(profiler_pb2.EvaluateRequest(models=["tiny"]), timeout=TIMEOUT)
        await running.read()
        assert profiler.terminate() == 0


def test_a_wrong_setting_is_refused_at_the_start(stack: Stack) -> None:
    with pytest.raises(AssertionError, match="batches must ascend"):
        stack.start_profiler(batches="8,1")


def test_a_profiler_says_at_its_start_where_compiled_kernels_are_kept(profiler: Process) -> None:
    assert "kernels are compiled for" in profiler.log
