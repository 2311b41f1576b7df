"""`helios bench served`: recorded arrivals, streams over HTTP, and the comparison at equal latency."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bench.load import clients, request_trace
from bench.load.clients import Request
from bench.load.request_trace import Arrival
from bench.peers.vllm_server import through_http
from bench.serving import comparison
from helios.errors import SettingsError
from helios.v1 import generation_pb2, inference_pb2

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,4096,109
2023-11-16 18:15:54.6805900,1,1
"""


def test_a_trace_is_read_shortened_and_stretched(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    arrivals = request_trace.read(file, 3)
    assert [(one.prompt_tokens, one.output_tokens) for one in arrivals] == [(374, 44), (4096, 109), (1, 1)]
    assert [one.seconds for one in arrivals] == pytest.approx([0, 4, 8])
    fitted = request_trace.shortened(arrivals, 0.5, context_tokens=512)
    assert [(one.prompt_tokens, one.output_tokens) for one in fitted] == [(187, 22), (458, 54), (1, 2)]
    # At half a request a second an interval is 2 s long.
    assert [one.seconds for one in request_trace.at_rate(fitted, 0.5)] == pytest.approx([0, 2, 4])


@pytest.mark.parametrize("content", [None, "a,b\n1,2\n", TRACE.replace("374", "many"), TRACE[:60]])
def test_what_is_no_trace_is_refused_with_the_columns_it_needs(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "trace.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=r"columns TIMESTAMP|ask for fewer"):
        request_trace.read(file, 3)


class Endpoint:
    """A completions endpoint. It answers with `pieces`, each a chunk of the body, and keeps requests."""

    def __init__(self, pieces: list[bytes], status: str = "200 OK") -> None:
        self.asked: list[dict[str, Any]] = []
        self._pieces, self._status = pieces, status

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = 0
        while line := (await reader.readline()).strip():
            name, _, value = line.partition(b": ")
            length = int(value) if name.lower() == b"content-length" else length
        self.asked.append(json.loads(await reader.readexactly(length)))
        writer.write(f"HTTP/1.1 {self._status}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for piece in self._pieces:
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        writer.close()


async def stream_from(endpoint: Endpoint) -> clients.Stream:
    server = await asyncio.start_server(endpoint.answer, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        return await clients.consume(through_http(host, port, "m"), 0, Request((2, 9), 3))


def event(*token_ids: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": "x", "token_ids": token_ids}]}).encode() + b"\n\n"


async def test_tokens_of_an_http_stream_are_taken_from_events_however_they_are_cut() -> None:
    body = event(5) + event(6, 7) + b"data: [DONE]\n\n"
    for cut in range(1, len(body), 7):
        endpoint = Endpoint([body[:cut], body[cut:], b""])
        stream = await stream_from(endpoint)
        assert (stream.token_ids, stream.error) == ([5, 6, 7], "")
        (asked,) = endpoint.asked
        assert (asked["prompt"], asked["max_tokens"], asked["ignore_eos"]) == ([2, 9], 3, True)


async def test_an_http_stream_that_is_refused_or_breaks_off_has_failed() -> None:
    refused = await stream_from(Endpoint([b"too much"], "429 Too Many Requests"))
    assert "429" in refused.error
    broken = await stream_from(Endpoint([event(5)]))
    assert "broke off" in broken.error


async def test_replayed_requests_open_when_they_arrive_not_when_others_end() -> None:
    waiting: list[int] = []
    all_open = asyncio.Event()

    async def answer(index: int) -> AsyncIterator[inference_pb2.GenerateResponse]:
        waiting.append(index)
        if len(waiting) == 3:
            all_open.set()
        # No stream ends before the last one has been opened.
        await all_open.wait()
        yield inference_pb2.GenerateResponse(
            chunk=generation_pb2.Chunk(tokens=[generation_pb2.Token(token_id=index)])
        )

    arrivals = [Arrival(seconds, 1, 2) for seconds in (0.0, 0.02, 0.01)]
    requests = [Request((number,), 2) for number in range(3)]
    streams = await comparison.replay(lambda index, _: answer(index), requests, arrivals)
    assert [stream.token_ids for stream in streams] == [[0], [1], [2]]
    assert sorted(waiting) == [0, 1, 2]


def run(system: str, rate: float, p99: float, failed: int = 0) -> dict[str, Any]:
    figures = {"tpot_ms": {"p99": p99}, "failed": failed}
    return {"system": system, "requests_per_second": rate, "summary": figures}


def test_systems_are_compared_at_no_higher_p99_and_only_where_all_was_served() -> None:
    runs = [
        run("vllm", 2.8, 99),
        run("vllm", 2.0, 30),
        run("vllm", 1.0, 10),
        run("vllm", 3.0, 50, failed=1),
        run("helios", 2.5, 9),
        run("helios", 5.0, 20),
        run("helios", 7.0, 31),
        run("helios", 6.0, 25, failed=2),
    ]
    compared = comparison.at_same_latency(runs)
    assert [(one["vllm"], one["helios"], one["ratio"]) for one in compared] == [
        (1.0, 2.5, 2.5),
        (2.0, 5.0, 2.5),
        (2.8, 7.0, 2.5),
    ]
    (target,) = comparison.targets(compared)
    assert target.met
    slow = [one for one in runs if one["requests_per_second"] != 5.0]
    (target,) = comparison.targets(comparison.at_same_latency(slow))
    assert not target.met


def test_a_system_that_never_reaches_the_latency_misses_the_target() -> None:
    stretched = [run("vllm", 2.0, 30), run("helios", 3.0, 20), run(comparison.HELIOS_STRETCHED, 4.0, 30)]
    assert comparison.at_same_latency(stretched)[0]["helios"] == 4.0
    compared = comparison.at_same_latency([run("vllm", 2.0, 30), run("helios", 4.0, 40)])
    assert [target.met for target in comparison.targets(compared)] == [False]
    assert comparison.targets(comparison.at_same_latency([run("helios", 4.0, 40)])) == []


def test_shares_of_capacity_ascend_below_all_of_it() -> None:
    assert all(low < high for low, high in itertools.pairwise((0, *comparison.SHARES, 1)))
