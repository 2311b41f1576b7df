"""Promises of the traces. A real gateway and worker send spans to a collector in the test."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from helios.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from tests.otlp_collector import Collector, Span
from tests.stack import Process, Stack, free_port

GATEWAY, WORKER = "helios-gateway", "helios-worker"
# The spans of a request that ran on one worker: service and name.
ONE_REQUEST = Counter(
    [(GATEWAY, "Generate"), (WORKER, "Generate"), (WORKER, "queue"), (WORKER, "prefill"), (WORKER, "decode")]
)


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    yield server
    server.stop()


@pytest.fixture
def traced(stack: Stack, collector: Collector) -> Stack:
    """A stack whose parts send their spans to the collector without delay."""
    stack.environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    return stack


def generate(
    gateway: Process, request_id: str, tokens: int, metadata: tuple[tuple[str, str], ...] = ()
) -> generation_pb2.Finish:
    request = inference_pb2.GenerateRequest(
        request_id=request_id,
        token_ids=generation_pb2.TokenIds(ids=[2, 10, 11, 12]),
        sampling=generation_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True),
    )
    with grpc.insecure_channel(gateway.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        *_, last = stub.Generate(request, timeout=60, metadata=metadata)
    assert last.finish.completion_tokens == tokens
    return last.finish


def names(spans: list[Span]) -> Counter[tuple[str, str]]:
    return Counter((span.service, span.name) for span in spans)


def log_lines(process: Process) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.log.splitlines()]


def test_one_request_is_one_trace_across_gateway_and_worker(traced: Stack, collector: Collector) -> None:
    worker = traced.start_worker()
    gateway = traced.start_gateway(workers=[worker.address])

    generate(gateway, "request-1", tokens=8)

    spans = collector.wait_for(lambda spans: names(spans) == ONE_REQUEST)
    by_name = {(span.service, span.name): span for span in spans}
    entry, served = by_name[GATEWAY, "Generate"], by_name[WORKER, "Generate"]
    queue, prefill, decode = (by_name[WORKER, name] for name in ("queue", "prefill", "decode"))
    assert {span.trace_id for span in spans} == {entry.trace_id}
    assert entry.parent_id == ""
    assert served.parent_id == entry.span_id
    assert {queue.parent_id, prefill.parent_id, decode.parent_id} == {served.span_id}
    # The phases follow each other without a gap, within the request's span.
    assert entry.start <= served.start <= queue.start
    assert (queue.end, prefill.end) == (prefill.start, decode.start)
    assert queue.start <= queue.end <= prefill.end <= decode.end
    # Both spans end after the last token. The gateway's span does not wait for the worker's.
    assert decode.end <= served.end
    assert decode.end <= entry.end
    assert entry.attributes["helios.request_id"] == served.attributes["helios.request_id"] == "request-1"
    assert served.attributes["helios.model"] == "tiny"
    assert served.attributes["helios.depth"] == 4
    assert served.attributes["helios.completion_tokens"] == 8


def test_longer_text_makes_no_more_spans(traced: Stack, collector: Collector) -> None:
    worker = traced.start_worker()
    gateway = traced.start_gateway(workers=[worker.address])

    generate(gateway, "long", tokens=100)
    # All spans are sent before a process ends.
    assert gateway.terminate() == 0
    assert worker.terminate() == 0

    assert names(collector.spans) == ONE_REQUEST


def test_clients_trace_goes_on_and_stands_in_the_logs(traced: Stack, collector: Collector) -> None:
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    worker = traced.start_worker()
    gateway = traced.start_gateway(workers=[worker.address])

    generate(gateway, "mine", 4, metadata=(("traceparent", f"00-{trace_id}-{parent_id}-01"),))

    spans = collector.wait_for(lambda spans: names(spans) == ONE_REQUEST)
    assert {span.trace_id for span in spans} == {trace_id}
    (entry,) = (span for span in spans if span.service == GATEWAY)
    assert entry.parent_id == parent_id
    for process, service in ((gateway, GATEWAY), (worker, WORKER)):
        logged = [line for line in log_lines(process) if line.get("trace_id") == trace_id]
        assert logged, process.log
        assert {line["service"] for line in logged} == {service}
        own = {span.span_id for span in spans if span.service == service}
        assert {line["span_id"] for line in logged} <= own


def test_refused_request_is_a_failed_span(traced: Stack, collector: Collector) -> None:
    worker = traced.start_worker()
    gateway = traced.start_gateway(workers=[worker.address])

    with grpc.insecure_channel(gateway.address) as channel, pytest.raises(grpc.RpcError) as refusal:
        list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest()))

    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (span,) = collector.wait_for(lambda spans: len(spans) == 1)
    assert (span.service, span.name) == (GATEWAY, "Generate")
    assert span.status == 2  # STATUS_CODE_ERROR


def test_resumed_stream_stays_one_trace(traced: Stack, collector: Collector) -> None:
    first = traced.start_worker(model="long")
    second = traced.start_worker(model="long")
    gateway = traced.start_gateway(
        workers=[first.address, second.address], worker_timeout_seconds=600, engine_timeout_seconds=600
    )
    request = inference_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[2, 10, 11, 12]),
        sampling=generation_pb2.SamplingParams(max_tokens=1000, ignore_eos=True),
    )

    with grpc.insecure_channel(gateway.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        stream = stub.Generate(request, timeout=120)
        next(stream)
        with first.frozen(), second.frozen():
            status = stub.GetServingStatus(inference_pb2.GetServingStatusRequest())
            (serving,) = (state.address for state in status.workers if state.open_streams)
            (lost,) = (worker for worker in (first, second) if worker.address == serving)
            lost.kill()
        *_, last = stream

    assert last.finish.resumed == 1
    assert last.finish.completion_tokens == 1000
    # The spans of the killed worker are lost.
    spans = collector.wait_for(lambda spans: names(spans) == ONE_REQUEST)
    assert len({span.trace_id for span in spans}) == 1
    (entry,) = (span for span in spans if span.service == GATEWAY)
    assert "resume" in entry.events


def test_streams_go_on_without_their_collector(stack: Stack) -> None:
    stack.environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    worker = stack.start_worker()
    gateway = stack.start_gateway(workers=[worker.address])

    for number in range(3):
        generate(gateway, f"request-{number}", tokens=8)

    assert gateway.terminate() == 0
    assert worker.terminate() == 0
