"""The benches' load generator and report."""

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.load import clients
from bench.load.clients import Request, Stream
from bench.load.latency import percentile
from bench.results import Report, Target
from helios.v1 import generation_pb2, inference_pb2


def test_percentile_is_the_smallest_value_that_covers_its_share() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile(values, 0.999) == 100
    assert percentile([7.0], 0.5) == 7
    assert math.isnan(percentile([], 0.5))


def test_summary_counts_from_the_first_opening_to_the_last_token() -> None:
    request = Request((1, 2), 3)
    first = Stream(request, opened=10.0, token_ids=[5, 6, 7], token_times=[10.5, 11.0, 11.5])
    second = Stream(request, opened=11.0, token_ids=[5, 6, 7], token_times=[12.0, 13.0, 14.0])
    failed = Stream(request, opened=11.0, error="UNAVAILABLE: gone")
    summary = clients.summarise([first, second, failed])
    assert (summary.streams, summary.failed, summary.tokens, summary.seconds) == (3, 1, 6, 4.0)
    assert summary.tokens_per_second == 1.5
    assert (summary.ttft_ms.p50, summary.ttft_ms.p99) == (500, 1000)
    assert (summary.tpot_ms.p50, summary.tpot_ms.p99) == (500, 1000)


async def test_no_more_streams_are_open_than_asked_for() -> None:
    now_open, most_open = 0, 0

    async def open_stream(index: int, request: Request) -> AsyncIterator[inference_pb2.GenerateResponse]:
        nonlocal now_open, most_open
        now_open += 1
        most_open = max(most_open, now_open)
        for position in range(request.max_tokens):
            token = generation_pb2.Token(index=position, token_id=index)
            yield inference_pb2.GenerateResponse(chunk=generation_pb2.Chunk(tokens=[token]))
        now_open -= 1
        yield inference_pb2.GenerateResponse(finish=generation_pb2.Finish(resumed=1))

    requests = [Request((index,), 2) for index in range(10)]
    streams = await clients.run(open_stream, requests, concurrency=3)
    assert most_open <= 3
    assert sorted(stream.token_ids for stream in streams) == [[index, index] for index in range(10)]
    assert all(stream.resumed == 1 for stream in streams)


def test_report_names_machine_command_and_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [Target("parity", "64", 63, met=False)]
    made = Report({"speed": 1.5, "unknown": math.nan}, targets, [("speed", "1.5 tokens/s")])
    made.write(tmp_path / "report.json")
    made.show()
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.keys() == {"machine", "command", "results", "targets"}
    assert {"cpu", "cores", "memory_bytes", "python", "torch"} <= written["machine"].keys()
    assert written["results"] == {"speed": 1.5, "unknown": None}
    assert written["targets"] == [{"name": "parity", "target": "64", "measured": 63, "met": False}]
    shown = capsys.readouterr().out
    assert "1.5 tokens/s" in shown
    assert "no" in shown
