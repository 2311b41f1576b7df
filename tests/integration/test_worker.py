"""A worker process as gateways and the controller see it through its socket."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from redis import Redis
from tokenizers import Tokenizer

from helios.client import error_of
from helios.errors import DeadlineExceededError, InvalidRequestError
from helios.redis_schema import CONTROLLER_STATE
from helios.v1 import generation_pb2, worker_pb2, worker_pb2_grpc
from tests.stack import Process, Stack, free_port

Response = worker_pb2.WorkerServiceGenerateResponse
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models and `broken`, whose weights are cut off."""
    directory = tmp_path_factory.mktemp("with-broken") / "models"
    shutil.copytree(tiny_models, directory)
    shutil.copytree(directory / "tiny", directory / "broken")
    weights = directory / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return directory


@pytest.fixture
def worker(stack: Stack, models: Path) -> Process:
    return stack.start_worker(model="tiny", depth=4, models_dir=models)


@pytest.fixture
def busy_stub(stack: Stack, models: Path) -> Iterator[worker_pb2_grpc.WorkerServiceStub]:
    """A worker with two places in its batch and no bursts, so that many streams keep it busy for seconds."""
    worker = stack.start_worker(model="tiny", depth=4, models_dir=models, max_running=2, burst_seconds=0)
    with grpc.insecure_channel(worker.address) as channel:
        yield worker_pb2_grpc.WorkerServiceStub(channel)


@pytest.fixture
def channel(worker: Process) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(worker.address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> worker_pb2_grpc.WorkerServiceStub:
    return worker_pb2_grpc.WorkerServiceStub(channel)


def request(
    prompt: list[int], emitted: list[int] | None = None, model: str = "", **sampling: object
) -> worker_pb2.WorkerServiceGenerateRequest:
    params = {"max_tokens": 20, "seed": 1, "ignore_eos": True} | sampling
    return worker_pb2.WorkerServiceGenerateRequest(
        request_id="test",
        prompt_ids=prompt,
        emitted_ids=emitted or [],
        sampling=generation_pb2.SamplingParams(**params),
        model=model,
    )


def tokens_of(responses: Iterator[Response]) -> tuple[list[generation_pb2.Token], generation_pb2.Finish]:
    messages = list(responses)
    tokens = [token for message in messages for token in message.chunk.tokens]
    return tokens, messages[-1].finish


def test_tokens_carry_their_facts(stub: worker_pb2_grpc.WorkerServiceStub) -> None:
    tokens, finish = tokens_of(stub.Generate(request([2, 50, 60]), timeout=TIMEOUT))
    assert [token.index for token in tokens] == list(range(20))
    assert {(token.exit_layer, token.model) for token in tokens} == {(4, "tiny")}
    assert all(token.logprob <= 0 and 0 < token.confidence <= 1 for token in tokens)
    assert "".join(token.text for token in tokens) == finish.text
    assert (finish.prompt_tokens, finish.completion_tokens) == (3, 20)
    assert finish.reason == generation_pb2.FINISH_REASON_LENGTH


def test_a_sequence_goes_on_after_the_tokens_it_is_given(stub: worker_pb2_grpc.WorkerServiceStub) -> None:
    whole, finish = tokens_of(stub.Generate(request([2, 50], temperature=1.0), timeout=TIMEOUT))
    ids = [token.token_id for token in whole]
    for cut in (1, 13, 20):
        rest, end = tokens_of(stub.Generate(request([2, 50], ids[:cut], temperature=1.0), timeout=TIMEOUT))
        assert [token.token_id for token in rest] == ids[cut:]
        assert end == finish


@pytest.mark.parametrize(
    ("bad", "code", "said"),
    [
        (request([]), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        (request([2, 512]), grpc.StatusCode.INVALID_ARGUMENT, "vocabulary of 512"),
        (request([2], temperature=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (request([2], max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (request([2], model="nobody"), grpc.StatusCode.NOT_FOUND, "'tiny' is"),
    ],
)
def test_a_bad_request_is_refused_and_disturbs_no_neighbour(
    stub: worker_pb2_grpc.WorkerServiceStub,
    bad: worker_pb2.WorkerServiceGenerateRequest,
    code: grpc.StatusCode,
    said: str,
) -> None:
    neighbour = stub.Generate(request([2, 7], max_tokens=200), timeout=TIMEOUT)
    next(neighbour)
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Generate(bad, timeout=TIMEOUT))
    assert refused.value.code() == code
    assert said in refused.value.details()
    assert "Traceback" not in refused.value.details()
    assert tokens_of(neighbour)[1].completion_tokens == 200


class Caller:
    """One GenerateMany call as a gateway makes it."""

    def __init__(self, stub: worker_pb2_grpc.WorkerServiceStub) -> None:
        self._requests: SimpleQueue[worker_pb2.GenerateManyRequest | None] = SimpleQueue()
        self.call = stub.GenerateMany(iter(self._requests.get, None), timeout=TIMEOUT)

    def start(self, number: int, request: worker_pb2.WorkerServiceGenerateRequest, **more: float) -> None:
        start = worker_pb2.SequenceStart(sequence=number, request=request, **more)
        self._requests.put(worker_pb2.GenerateManyRequest(start=start))

    def cancel(self, number: int) -> None:
        self._requests.put(worker_pb2.GenerateManyRequest(cancel=number))

    def say_last(self) -> None:
        self._requests.put(None)


def test_one_call_carries_what_many_would(stub: worker_pb2_grpc.WorkerServiceStub) -> None:
    requests = [request([2, 30 + number], max_tokens=100) for number in range(8)]
    alone = [tokens_of(stub.Generate(one, timeout=TIMEOUT)) for one in requests]
    caller = Caller(stub)
    for number, one in enumerate(requests):
        caller.start(number, one)
    caller.say_last()
    messages = list(caller.call)
    outputs = [output for message in messages for output in message.outputs]
    for number, (tokens, finish) in enumerate(alone):
        own, end = tokens_of(output.response for output in outputs if output.sequence == number)
        assert [token.token_id for token in own] == [token.token_id for token in tokens]
        assert end == finish
    assert len(messages) < 8 * 100 / 2, "what a step gave to all of them travels together"


def test_a_failing_sequence_disturbs_no_neighbour_in_its_call(
    stub: worker_pb2_grpc.WorkerServiceStub,
) -> None:
    caller = Caller(stub)
    caller.start(0, request([2, 7], max_tokens=200))
    caller.start(1, request([2, 512]))
    caller.start(2, request([2, 8], max_tokens=250), timeout_seconds=0)
    caller.say_last()
    outputs = [output for message in caller.call for output in message.outputs]
    errors = {
        output.sequence: error_of(status_pb2.Status.FromString(output.status))
        for output in outputs
        if output.HasField("status")
    }
    kinds = {number: type(error) for number, error in errors.items()}
    assert kinds == {1: InvalidRequestError, 2: DeadlineExceededError}
    assert "vocabulary of 512" in errors[1].message
    tokens, finish = tokens_of(output.response for output in outputs if output.sequence == 0)
    assert len(tokens) == finish.completion_tokens == 200


@pytest.mark.parametrize("one_by_one", [True, False])
def test_sequences_cancelled_or_lost_with_their_call_free_their_kv(stack: Stack, one_by_one: bool) -> None:
    # With one place in the batch, the streams would run for very long.
    worker = stack.start_worker(model="tiny", max_running=1)
    with grpc.insecure_channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        caller = Caller(stub)
        for number in range(100):
            caller.start(number, request([2] * 20, max_tokens=230))
        next(caller.call)
        if one_by_one:
            for number in range(100):
                caller.cancel(number)
            caller.say_last()
            list(caller.call)
        else:
            caller.call.cancel()
        watch = stub.WatchTelemetry(worker_pb2.WatchTelemetryRequest(interval_seconds=0.05), timeout=TIMEOUT)
        load = next(message.telemetry for message in watch if _idle(message.telemetry))
        assert load.generated_tokens < 100 * 230


def _idle(load: worker_pb2.Telemetry) -> bool:
    return load.running == load.waiting == 0 and load.blocks_free == load.blocks_total


def test_a_reload_moves_running_streams_without_loss(
    busy_stub: worker_pb2_grpc.WorkerServiceStub,
) -> None:
    stub = busy_stub
    streams = [stub.Generate(request([2, 30 + n], max_tokens=150), timeout=TIMEOUT) for n in range(96)]
    next(streams[0])
    moved = 0
    for model, depth in (("tiny", 2), ("other", 4), ("tiny", 1)):
        *stages, done = stub.Reload(worker_pb2.ReloadRequest(model=model, depth=depth), timeout=TIMEOUT)
        assert worker_pb2.RELOAD_STAGE_LOADING in [stage.stage for stage in stages] or depth == 1
        assert done.stage == worker_pb2.RELOAD_STAGE_DONE
        assert done.layers_loaded == done.layers_total == depth
        moved += done.sequences_moved
        status = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=TIMEOUT)
        assert (status.model.name, status.model.depth) == (model, depth)
    assert moved > 0
    for stream in streams:
        tokens, finish = tokens_of(stream)
        # The first message of one stream was taken above.
        assert tokens[0].index == 0 or stream is streams[0]
        assert [token.index for token in tokens] == list(range(tokens[0].index, 150))
        assert finish.completion_tokens == 150
        assert finish.text.endswith("".join(token.text for token in tokens))


def test_a_reload_can_bring_its_threshold(stub: worker_pb2_grpc.WorkerServiceStub) -> None:
    for asked, given in ((0.35, 0.35), (None, 0.2)):
        list(stub.Reload(worker_pb2.ReloadRequest(model="tiny", depth=2, threshold=asked), timeout=TIMEOUT))
        status = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=TIMEOUT)
        assert status.model.threshold == pytest.approx(given)
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Reload(worker_pb2.ReloadRequest(model="tiny", depth=2, threshold=1.5), timeout=TIMEOUT))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("model", "depth", "code", "said"),
    [
        ("nobody", 1, grpc.StatusCode.NOT_FOUND, "available: "),
        ("tiny", 3, grpc.StatusCode.INVALID_ARGUMENT, "1, 2, 4"),
        ("broken", 4, grpc.StatusCode.FAILED_PRECONDITION, "model.safetensors"),
        ("../tiny", 4, grpc.StatusCode.NOT_FOUND, "available: "),
    ],
)
def test_a_failed_reload_leaves_the_old_plan_serving(
    stub: worker_pb2_grpc.WorkerServiceStub,
    model: str,
    depth: int,
    code: grpc.StatusCode,
    said: str,
) -> None:
    stream = stub.Generate(request([2, 30], max_tokens=150), timeout=TIMEOUT)
    # If the worker was quick, the whole stream may have arrived already.
    first = next(stream)
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Reload(worker_pb2.ReloadRequest(model=model, depth=depth), timeout=TIMEOUT))
    assert refused.value.code() == code
    assert said in refused.value.details()
    status = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=TIMEOUT)
    assert (status.model.name, status.model.depth) == ("tiny", 4)
    tokens, finish = tokens_of(itertools.chain([first], stream))
    assert finish.completion_tokens == len(tokens) == 150
    assert {token.exit_layer for token in tokens} == {4}


def served_by(worker: Process) -> tuple[str, int]:
    with grpc.insecure_channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        model = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=TIMEOUT).model
        return model.name, model.depth


def test_a_killed_worker_goes_on_with_the_plan_that_it_served_last(stack: Stack, tmp_path: Path) -> None:
    flags = {
        "worker_id": "w",
        "plan_file": tmp_path / "plan.json",
        # Nothing listens on this port.
        "redis_url": f"redis://127.0.0.1:{free_port()}/0",
    }
    worker = stack.start_worker("tiny", 4, **flags)
    assert served_by(worker) == ("tiny", 4)
    with grpc.insecure_channel(worker.address) as channel:
        reload = worker_pb2.ReloadRequest(model="other", depth=2)
        list(worker_pb2_grpc.WorkerServiceStub(channel).Reload(reload, timeout=TIMEOUT))
    worker.kill()
    worker = stack.start_worker("tiny", 4, **flags)
    assert served_by(worker) == ("other", 2)
    assert "the plan in force cannot be read from Redis" in worker.log
    worker.kill()
    assert served_by(stack.start_worker("tiny", 1, **flags)) == ("tiny", 1), "somebody wants another one"


def plans_of(stub: worker_pb2_grpc.WorkerServiceStub) -> list[tuple[str, int]]:
    status = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=TIMEOUT)
    return [(plan.model, plan.depth) for plan in status.plans]


def test_a_worker_serves_a_set_of_plans_and_again_after_it_was_killed(stack: Stack, tmp_path: Path) -> None:
    flags = {"worker_id": "w", "plan_file": tmp_path / "plan.json"}
    worker = stack.start_worker("tiny", 4, **flags)
    reload = worker_pb2.ReloadRequest(model="tiny", depth=2)
    reload.also.add(model="other", depth=4)
    reload.also.add(model="tiny", depth=4)
    plans = [("tiny", 2), ("other", 4), ("tiny", 4)]
    texts = []
    for _ in range(2):
        with grpc.insecure_channel(worker.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            if not texts:
                list(stub.Reload(reload, timeout=TIMEOUT))
            assert plans_of(stub) == plans
            # All run at once, so that rows of both depths are in one batch.
            sent = []
            for model, depth in plans:
                message = request([2, 50, 60], model=model)
                message.depth = depth
                sent.append(stub.Generate(message, timeout=TIMEOUT))
            for call, plan in zip(sent, plans, strict=True):
                tokens, finish = tokens_of(call)
                assert {(token.model, token.exit_layer) for token in tokens} == {plan}
                assert (finish.model, finish.depth) == plan
                texts.append(finish.text)
            with pytest.raises(grpc.RpcError) as refused:
                absent = request([2, 50, 60], model="other")
                absent.depth = 2
                tokens_of(stub.Generate(absent, timeout=TIMEOUT))
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        worker.kill()
        worker = stack.start_worker("tiny", 4, **flags)
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(("model", "depth", "said"), [("nobody", 1, "available: "), ("tiny", 3, "1, 2, 4")])
def test_a_pinned_plan_that_cannot_be_loaded_keeps_no_worker_from_starting(
    stack: Stack, model: str, depth: int, said: str
) -> None:
    stack.start_redis()
    pins = {"w": {"model": model, "depth": depth}}
    with Redis.from_url(stack.redis_url) as redis:
        redis.hset(CONTROLLER_STATE, "state", json.dumps({"pins": pins}))
    worker = stack.start_worker("tiny", 4, worker_id="w")
    assert served_by(worker) == ("tiny", 4)
    assert f"{model} at depth {depth}, which is in force, cannot be loaded" in worker.log
    assert said in worker.log


def test_draining_hands_running_sequences_back(busy_stub: worker_pb2_grpc.WorkerServiceStub) -> None:
    stub = busy_stub
    streams = [stub.Generate(request([2, 30 + n], max_tokens=250), timeout=TIMEOUT) for n in range(32)]
    next(streams[0])
    drained = stub.Drain(worker_pb2.DrainRequest(grace_seconds=0), timeout=TIMEOUT)
    refused = []
    for calls in (*streams, stub.Generate(request([2]), timeout=TIMEOUT)):
        try:
            list(calls)
        except grpc.RpcError as error:
            refused.append(error)
    assert len(refused) > drained.handed_back > 0, "the last was not even begun"
    for error in refused:
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "draining" in error.details()
    telemetry = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=TIMEOUT).telemetry
    assert telemetry.draining
    assert telemetry.blocks_free == telemetry.blocks_total


def test_fewer_layers_read_and_hold_fewer_bytes(stack: Stack) -> None:
    status = {}
    for depth in (1, 4):
        process = stack.start_worker(model="tiny", depth=depth)
        with grpc.insecure_channel(process.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            status[depth] = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=TIMEOUT)
    hidden, ffn, layers = 64, 256, 3
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * ffn + ffn + hidden + 4 * hidden
    assert status[4].bytes_read - status[1].bytes_read == layers * layer * 4
    assert status[4].model.weight_bytes - status[1].model.weight_bytes == layers * layer * 4
    assert status[4].model.kv_bytes_per_token == 4 * status[1].model.kv_bytes_per_token
    assert 0 < status[1].resident_bytes < status[4].resident_bytes


def test_telemetry_keeps_coming_while_the_engine_works(
    busy_stub: worker_pb2_grpc.WorkerServiceStub,
) -> None:
    stub = busy_stub
    watch = stub.WatchTelemetry(worker_pb2.WatchTelemetryRequest(interval_seconds=0.05), timeout=TIMEOUT)
    # Streams that sample take longer.
    long = request([2] * 60, max_tokens=190, temperature=0.9)
    streams = [stub.Generate(long, timeout=TIMEOUT) for _ in range(16)]
    seen = []
    for message in watch:
        seen.append(message.telemetry)
        if message.telemetry.finished_sequences == 16:
            break
    for stream in streams:
        assert tokens_of(stream)[1].completion_tokens == 190
    busy = [telemetry for telemetry in seen if telemetry.running]
    assert len(busy) >= 3
    assert max(telemetry.running for telemetry in busy) > 1
    assert [t.generated_tokens for t in seen] == sorted(t.generated_tokens for t in seen)
    with pytest.raises(grpc.RpcError) as refused:
        next(stub.WatchTelemetry(worker_pb2.WatchTelemetryRequest(interval_seconds=0), timeout=TIMEOUT))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_new_plan_and_a_drain_are_told_at_once(stub: worker_pb2_grpc.WorkerServiceStub) -> None:
    asked = worker_pb2.WatchTelemetryRequest(interval_seconds=10 * TIMEOUT)
    watch = stub.WatchTelemetry(asked, timeout=TIMEOUT)
    assert next(watch).telemetry.depth == 4
    list(stub.Reload(worker_pb2.ReloadRequest(model="tiny", depth=2), timeout=TIMEOUT))
    assert next(watch).telemetry.depth == 2
    stub.Drain(worker_pb2.DrainRequest(grace_seconds=0), timeout=TIMEOUT)
    assert next(watch).telemetry.draining


def test_the_tokenizer_is_the_one_its_id_names(stub: worker_pb2_grpc.WorkerServiceStub) -> None:
    answer = stub.GetTokenizer(worker_pb2.GetTokenizerRequest(), timeout=TIMEOUT)
    model = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=TIMEOUT).model
    assert answer.tokenizer_id == model.tokenizer_id == sha256(answer.tokenizer_json).hexdigest()
    assert Tokenizer.from_str(answer.tokenizer_json.decode()).encode("a").ids[0] == 2


def test_health_and_reflection_answer(worker: Process, channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "helios.v1.WorkerService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert "helios.v1.WorkerService" in ProtoReflectionDescriptorDatabase(channel).get_services()
    assert worker.terminate() == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "nobody"], "no model 'nobody'"),
        (["--model", "tiny", "--depth", "3"], "its depths are 1, 2, 4"),
        (["--model", "tiny", "--depth", "2", "--exit-mode", "full"], "exit mode full"),
        (["--model", "tiny", "--memory-bytes", "1000"], "give at least"),
        (["--model", "tiny", "--threads", "0"], "threads"),
        (["--model", "tiny", "--redis-url", "http://host"], "redis_url"),
        (["--model", "tiny", "--address", "256.0.0.1:5"], "cannot listen on 256.0.0.1:5"),
    ],
)
def test_a_worker_that_cannot_start_says_why(tiny_models: Path, flags: list[str], said: str) -> None:
    command = [sys.executable, "-m", "services.worker", "--models-dir", str(tiny_models), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ended.returncode == 1
    assert said in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_worker_says_at_its_start_where_compiled_kernels_are_kept(worker: Process) -> None:
    assert "kernels are compiled for" in worker.log
