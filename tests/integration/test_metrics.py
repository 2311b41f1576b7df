"""Promises of the metrics. Real services send them to a collector in the test by OTLP over gRPC."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import yaml

from helios.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    generation_pb2,
    inference_pb2,
    inference_pb2_grpc,
)
from tests.otlp_collector import Collector, Point
from tests.stack import Process, Stack

DEPLOY = Path(__file__).parents[2] / "deploy"
QUICK = {"telemetry_seconds": 0.05, "discovery_seconds": 0.1}
# The labels by which queries name the metrics' attributes.
LABELS = {"helios_worker", "helios_model", "helios_depth", "helios_status", "helios_trigger"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    yield server
    server.stop()


@pytest.fixture
def measured(stack: Stack, collector: Collector) -> Stack:
    """A stack whose parts often send their metrics to the collector."""
    stack.environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRIC_EXPORT_INTERVAL": "100",
    }
    return stack


def generate(gateway: Process, tokens: int) -> None:
    request = inference_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[2, 10, 11, 12]),
        sampling=generation_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True),
    )
    with grpc.insecure_channel(gateway.address) as channel:
        *_, last = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60)
    assert last.finish.completion_tokens == tokens


def refuse(gateway: Process) -> None:
    with grpc.insecure_channel(gateway.address) as channel, pytest.raises(grpc.RpcError):
        list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest()))


def last(points: list[Point], metric: str) -> dict[tuple[object, ...], float]:
    """The newest values of a metric, by the values of its attributes."""
    return {
        tuple(value for _, value in sorted(point.attributes.items())): point.value
        for point in points
        if point.metric == metric
    }


def reached(metric: str, values: dict[tuple[object, ...], float]) -> Callable[[list[Point]], bool]:
    return lambda points: last(points, metric) == values


def prometheus_names(point: Point) -> set[str]:
    """A metric's names in Prometheus (OpenTelemetry, Prometheus and OpenMetrics Compatibility)."""
    name = point.metric.replace(".", "_") + ("_seconds" if point.unit == "s" else "")
    if point.kind == "histogram":
        return {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    return {f"{name}_total" if point.kind == "sum" else name}


def asked_names() -> Counter[str]:
    """The metrics that the dashboard and the autoscaler ask Prometheus for."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/helios.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    scaled = yaml.safe_load((DEPLOY / "kubernetes/autoscaling/worker.yaml").read_text())
    queries += [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    names = re.findall(r"helios_\w+", " ".join(queries))
    return Counter(name for name in names if name not in LABELS)


def test_worker_tells_its_plan_its_load_and_its_latency(measured: Stack, collector: Collector) -> None:
    worker = measured.start_worker(worker_id="w1", depth=2)
    gateway = measured.start_gateway(workers=[worker.address])

    generate(gateway, tokens=8)
    generate(gateway, tokens=1)

    collector.wait_for_points(reached("helios.worker.depth", {("tiny", "w1"): 2}))
    collector.wait_for_points(reached("helios.worker.generated_tokens", {("w1",): 9}))
    collector.wait_for_points(reached("helios.worker.ttft", {(2, "tiny"): 2}))
    # A stream of one token has no TPOT.
    points = collector.wait_for_points(reached("helios.worker.tpot", {(2, "tiny"): 1}))
    assert {point.instance for point in points if point.service == "helios-worker"} == {"w1"}


def test_gateway_tells_how_streams_ended(measured: Stack, collector: Collector) -> None:
    worker = measured.start_worker()
    gateway = measured.start_gateway(workers=[worker.address])

    generate(gateway, tokens=4)
    refuse(gateway)

    ends = {("OK",): 1.0, ("INVALID_ARGUMENT",): 1.0}
    collector.wait_for_points(reached("helios.gateway.streams", ends))
    collector.wait_for_points(reached("helios.gateway.resumes", {(): 0}))


def test_dashboard_and_autoscaler_ask_only_for_what_services_send(
    measured: Stack, collector: Collector
) -> None:
    measured.start_redis()
    measured.start_worker()
    gateway = measured.start_gateway(**QUICK)
    controller = measured.start_controller(**QUICK)
    generate(gateway, tokens=8)
    # This leads to a decision, so that one can be counted.
    order = controller_pb2.SetSloRequest(slo=controller_pb2.Slo(objective=controller_pb2.OBJECTIVE_LATENCY))
    with grpc.insecure_channel(controller.address) as channel:
        collector.wait_for_points(reached("helios.controller.leading", {(): 1}))
        controller_pb2_grpc.ControllerServiceStub(channel).SetSlo(order, timeout=60)

    asked = asked_names()

    def sent(points: list[Point]) -> set[str]:
        return {name for point in points for name in prometheus_names(point)}

    assert asked
    collector.wait_for_points(lambda points: asked.keys() <= sent(points))
