"""The streams that clients get from a gateway with real workers, Redis and sockets."""

import asyncio
import math
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer

from helios.client import AsyncClient, Client, generate_request
from helios.errors import (
    HeliosError,
    InvalidRequestError,
    UnknownModelError,
)
from helios.v1 import generation_pb2, inference_pb2
from helios.v1.generation_pb2 import SamplingParams
from tests.stack import Process
from tests.streams import all_free, stream, until

SERVICE = "/helios.v1.InferenceService/"
LONG = SamplingParams(max_tokens=240, ignore_eos=True)


async def test_text_streams_token_by_token_with_every_field(client: AsyncClient) -> None:
    whole = await stream(client, generate_request("def add_argument(", sampling=LONG))
    assert whole.finish.reason == generation_pb2.FINISH_REASON_LENGTH
    assert len(whole.tokens) == 240
    for token in whole.tokens:
        assert token.model == "tiny"
        assert token.exit_layer == 4
        assert 0 < token.confidence <= 1
        assert -math.inf < token.logprob <= 0


async def test_text_and_its_token_ids_give_the_same_stream(client: AsyncClient, tiny_models: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_models / "tiny" / "tokenizer.json"))
    ids = tokenizer.encode("Return the parser").ids
    assert ids[0] == 2, "OPT prompts start with </s>"
    by_text = await stream(client, generate_request("Return the parser", sampling=LONG))
    by_ids = await stream(client, generate_request(ids, sampling=LONG))
    assert by_text.said == by_ids.said
    assert by_text.finish.prompt_tokens == len(ids)


async def test_a_long_text_is_tokenized_whole(client: AsyncClient, tiny_models: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_models / "tiny" / "tokenizer.json"))
    text = " positional" * 200
    prompt_tokens = len(tokenizer.encode(text).ids)
    assert prompt_tokens < 256
    assert len(text) > 2048
    whole = await stream(client, generate_request(text, sampling=LONG))
    assert whole.finish.prompt_tokens == prompt_tokens
    assert len(whole.tokens) == 256 - prompt_tokens, "max_tokens is cut to what the context leaves"


async def test_the_seed_decides_a_sampled_stream(client: AsyncClient) -> None:
    def request(seed: int | None) -> inference_pb2.GenerateRequest:
        sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, ignore_eos=True)
        return generate_request("class", sampling=sampling)

    first, again, other, unset, unset_again = [
        await stream(client, request(seed)) for seed in (1, 1, 2, None, None)
    ]
    assert first.ids == again.ids
    assert first.ids != other.ids
    assert unset.ids != unset_again.ids, "without a seed the gateway draws one per request"


async def test_streams_with_one_request_id_do_not_mix(client: AsyncClient) -> None:
    one, other = generate_request("if", request_id="r"), generate_request("class", request_id="r")
    alone = [await stream(client, one), await stream(client, other)]
    together = await asyncio.gather(stream(client, one), stream(client, other))
    assert [whole.said for whole in together] == [whole.said for whole in alone]


async def test_max_tokens_defaults_to_128(client: AsyncClient) -> None:
    whole = await stream(client, generate_request("if", sampling=SamplingParams(ignore_eos=True)))
    assert len(whole.tokens) == 128


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (inference_pb2.GenerateRequest(), "no prompt"),
        (generate_request(""), "prompt is empty"),
        (generate_request([]), "prompt is empty"),
        (generate_request([2, 512]), "id 512 is out of the vocabulary; ids go from 0 to 511"),
        (generate_request([2, 2**32 - 1]), "out of the vocabulary"),
        (generate_request([2] * 256), "prompt has 256 tokens; the model's context of 256"),
        (generate_request([2] * 3000), "prompt has 3000 tokens; this gateway takes at most 2048"),
        (generate_request("x y z " * 200), "prompt has"),
        (generate_request("word " * 1_000_000), "may have at most 255; shorten it"),
        (generate_request("a", sampling=SamplingParams(max_tokens=0)), "max_tokens must be at least 1"),
        (generate_request("a", sampling=SamplingParams(max_tokens=2049)), "max_tokens must be at most 2048"),
        (generate_request("a", sampling=SamplingParams(temperature=math.nan)), "temperature"),
        (generate_request("a", sampling=SamplingParams(temperature=-1)), "temperature"),
        (generate_request("a", sampling=SamplingParams(temperature=math.inf)), "temperature"),
        (generate_request("a", sampling=SamplingParams(top_p=0)), "top_p"),
        (generate_request("a", sampling=SamplingParams(top_p=1.5)), "top_p"),
        (generate_request("a", sampling=SamplingParams(top_p=math.nan)), "top_p"),
        (generate_request("a", sampling=SamplingParams(repetition_penalty=0)), "repetition_penalty"),
        (generate_request("a", sampling=SamplingParams(stop=[""])), "stop"),
        (generate_request("a", sampling=SamplingParams(stop=["x"] * 17)), "stop"),
        (generate_request("a", request_id="r" * 129), "request_id"),
        (generate_request("a", model="m" * 20_000), "model must have at most 256 characters"),
    ],
)
async def test_a_bad_request_gets_invalid_argument_with_a_reason(
    client: AsyncClient, request_: inference_pb2.GenerateRequest, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        await stream(client, request_)


@pytest.mark.parametrize(
    ("method", "raw"),
    [
        ("Generate", b"\x12\x02\xff\xfe"),  # text that is not UTF-8
        ("Generate", b"\x0a\x01\xff\x12\x01a"),  # request_id that is not UTF-8
        ("Generate", b"\x12\x7fabc"),  # a length beyond the message's end
        ("Generate", b"\xff\xff\xff\xff"),
        ("GetServingStatus", b"\xff\xff\xff\xff"),
    ],
)
async def test_bytes_that_are_no_request_get_invalid_argument(
    gateway: Process, method: str, raw: bytes
) -> None:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="is not a valid helios") as caught:
            async for _ in channel.unary_stream(SERVICE + method)(raw):
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in gateway.log


async def test_both_prompts_get_invalid_argument(gateway: Process) -> None:
    raw = generate_request([2, 5]).SerializeToString() + generate_request("a").SerializeToString()
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="both text and token_ids") as caught:
            async for _ in channel.unary_stream(SERVICE + "Generate")(raw):
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_model_is_not_found_and_the_served_ones_are_named(client: AsyncClient) -> None:
    with pytest.raises(UnknownModelError, match="model nope is not served; served are tiny"):
        await stream(client, generate_request("a", model="nope"))


async def test_bad_requests_do_not_disturb_a_neighbour(client: AsyncClient) -> None:
    request = generate_request("def main():", sampling=LONG)
    alone = await stream(client, request)
    bad = [generate_request([2, 512]), generate_request("a", model="nope"), generate_request("")]

    async def refused(request: inference_pb2.GenerateRequest) -> None:
        with pytest.raises(HeliosError):
            await stream(client, request)

    among, *_ = await asyncio.gather(stream(client, request), *(refused(one) for one in bad * 10))
    assert among.said == alone.said


async def test_a_cancelled_stream_frees_its_kv_blocks(client: AsyncClient) -> None:
    events = client.generate(generate_request("import", sampling=LONG))
    await anext(events)
    await events.aclose()
    await until(lambda: all_free(client), "the cancelled stream's KV blocks to be free")
    assert (await client.status()).workers[0].telemetry.generated_tokens > 0


async def test_status_shows_workers_limits_and_no_problems(client: AsyncClient) -> None:
    status = await client.status()
    assert [worker.worker_id for worker in status.workers] == ["served-worker"]
    assert status.workers[0].ready
    assert (status.workers[0].telemetry.model, status.workers[0].telemetry.depth) == ("tiny", 4)
    assert status.limits.max_prompt_tokens == 2048
    assert list(status.problems) == []


async def test_the_sync_client_streams_too(gateway: Process, client: AsyncClient) -> None:
    request = generate_request("class Parser", sampling=LONG)

    def collect() -> list[object]:
        with Client(gateway.address) as sync_client:
            assert sync_client.status().workers
            with pytest.raises(InvalidRequestError, match="prompt is empty"):
                list(sync_client.generate(generate_request("")))
            return list(sync_client.generate(request))

    whole = await stream(client, request)
    assert await asyncio.to_thread(collect) == [*whole.tokens, whole.finish]


async def test_health_names_the_service(gateway: Process) -> None:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="helios.v1.InferenceService")
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
