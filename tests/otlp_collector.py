"""An OTLP collector for tests: takes spans and metrics over gRPC and keeps them.

`python tests/otlp_collector.py ADDRESS` prints each span and each point of a metric as a line of JSON. It is
a stand-in where the real collector is not available.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2

WAIT_SECONDS = 60.0

_Arrival = TypeVar("_Arrival")


@dataclass(frozen=True)
class Span:
    """One span, ids in hexadecimal, times in nanoseconds since the epoch."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    status: int
    attributes: dict[str, Any] = field(default_factory=dict)
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """One value of a metric; for a histogram, its count. `kind`: gauge, sum or histogram."""

    service: str
    instance: str
    metric: str
    kind: str
    unit: str
    value: float
    attributes: dict[str, Any] = field(default_factory=dict)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """The collector, as a server with its own threads."""

    def __init__(
        self, address: str = "127.0.0.1:0", on_arrival: Callable[[Span | Point], None] | None = None
    ) -> None:
        self._spans: list[Span] = []
        self._points: list[Point] = []
        self._arrived = threading.Condition()
        self._on_arrival = on_arrival
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(self._add), self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(address)
        self._server.start()

    @property
    def endpoint(self) -> str:
        """The value for OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[Span]:
        """All spans that have arrived."""
        with self._arrived:
            return list(self._spans)

    @property
    def points(self) -> list[Point]:
        """All points of metrics that have arrived."""
        with self._arrived:
            return list(self._points)

    def wait_for(self, complete: Callable[[list[Span]], bool]) -> list[Span]:
        """All spans, once they are complete. If they never are, AssertionError names those that came."""
        return self._wait_for(complete, self._spans)

    def wait_for_points(self, complete: Callable[[list[Point]], bool]) -> list[Point]:
        """The same for the points of metrics."""
        return self._wait_for(complete, self._points)

    def _wait_for(self, complete: Callable[[list[_Arrival]], bool], came: list[_Arrival]) -> list[_Arrival]:
        deadline = time.monotonic() + WAIT_SECONDS
        with self._arrived:
            while not complete(came):
                if not self._arrived.wait(deadline - time.monotonic()):
                    raise AssertionError(f"only these came within {WAIT_SECONDS} s: {came}")
            return list(came)

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes a batch."""
        for resource_spans in request.resource_spans:
            resource = _attributes(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    self._add(
                        Span(
                            service=resource["service.name"],
                            instance=resource["service.instance.id"],
                            name=span.name,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            start=span.start_time_unix_nano,
                            end=span.end_time_unix_nano,
                            status=span.status.code,
                            attributes=_attributes(span.attributes),
                            events=tuple(event.name for event in span.events),
                        )
                    )
        return trace_service_pb2.ExportTraceServiceResponse()

    def _add(self, arrival: Span | Point) -> None:
        with self._arrived:
            if isinstance(arrival, Span):
                self._spans.append(arrival)
            else:
                self._points.append(arrival)
            self._arrived.notify_all()
        if self._on_arrival is not None:
            self._on_arrival(arrival)

    def stop(self) -> None:
        """Ends the server."""
        self._server.stop(None).wait()

    def join(self) -> None:
        """Serves until the process ends."""
        self._server.wait_for_termination()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    """The part of the collector that takes metrics."""

    def __init__(self, add: Callable[[Point], None]) -> None:
        self._add = add

    def Export(  # noqa: N802
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        """Takes a batch."""
        for resource_metrics in request.resource_metrics:
            resource = _attributes(resource_metrics.resource.attributes)
            for scope_metrics in resource_metrics.scope_metrics:
                for metric in scope_metrics.metrics:
                    for point in _points(metric, resource["service.name"], resource["service.instance.id"]):
                        self._add(point)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _points(metric: metrics_pb2.Metric, service: str, instance: str) -> Iterator[Point]:
    kind = metric.WhichOneof("data")
    assert kind is not None
    for point in getattr(metric, kind).data_points:
        value = point.count if kind == "histogram" else getattr(point, point.WhichOneof("value"))
        yield Point(service, instance, metric.name, kind, metric.unit, value, _attributes(point.attributes))


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


if __name__ == "__main__":
    Collector(sys.argv[1], lambda arrival: print(json.dumps(asdict(arrival)), flush=True)).join()  # noqa: T201
