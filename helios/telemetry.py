"""A service's telemetry: JSON log lines on stderr; OpenTelemetry spans and metrics on request.

One trace follows a request through gateway and worker. Spans and metrics are off unless the standard `OTEL_*`
variables request them. Even then they cost the engine's loop nothing. The loop only records times and counts.
`record_span` turns the times into spans when the request ends, and metrics are read from the counters when
they are sent. If a collector is down, spans and metrics are lost, but never a stream.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from asyncio import CancelledError
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind
from opentelemetry.util.types import AttributeValue

from helios.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger(__name__)

LOG_LEVEL_VARIABLE = "HELIOS_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_EXPORTERS = ("otlp", "console")
# Most characters of an exception's message in a line's `error`. `exception` holds the complete message.
_ERROR_CHARACTERS = 500
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

# Without the SDK this tracer creates no spans, but it passes on the trace that a caller has begun.
_tracer: trace.Tracer = trace.NoOpTracer()
_meter: metrics.Meter = metrics.NoOpMeter("helios")
_providers: "list[TracerProvider | MeterProvider]" = []

_Signal = Literal["traces", "metrics"]


def configure(service: str, instance: str = "") -> None:
    """Sets up logs and, if `OTEL_*` asks for them, traces and metrics. Call it once, before any logging.

    `service` is the kind of process ("helios-gateway"). `instance` distinguishes processes of one kind
    (default: host name and process id). `OTEL_*` overrides both in the data that is sent. Raises
    SettingsError when HELIOS_LOG_LEVEL is not a level.
    """
    global _meter, _tracer
    instance = instance or f"{socket.gethostname()}:{os.getpid()}"
    _configure_logs(service, instance)
    _tracer, _meter = _make_tracer(service, instance), _make_meter(service, instance)


def shutdown(timeout_seconds: float = 3.0) -> None:
    """Sends remaining spans and metrics, waiting at most for the timeout. Then turns both off."""
    global _meter, _providers, _tracer
    providers, _providers = _providers, []
    _tracer, _meter = trace.NoOpTracer(), metrics.NoOpMeter("helios")
    # The exporters may retry for longer than a stopping process can wait, so they run on threads that are
    # left behind.
    flushes = [
        threading.Thread(target=provider.shutdown, name="telemetry-shutdown", daemon=True)
        for provider in providers
    ]
    for flush in flushes:
        flush.start()
    deadline = time.monotonic() + timeout_seconds
    for flush in flushes:
        flush.join(max(0.0, deadline - time.monotonic()))
    if any(flush.is_alive() for flush in flushes):
        log.warning("the last spans or metrics are lost: no collector took them in %g s", timeout_seconds)


def meter() -> metrics.Meter:
    """The meter with which a service creates its instruments, once `configure` has run.

    Unless metrics were requested, the instruments do nothing: recording is an empty call, and observers are
    never called. Observers are called on their own thread.
    """
    return _meter


def extract(metadata: Iterable[tuple[str, str | bytes]] | None) -> Context:
    """The trace in a call's gRPC metadata (W3C Trace Context). Empty if there is none."""
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    return propagate.extract(carrier, context=Context())


def inject(context: Context | None = None) -> list[tuple[str, str]]:
    """gRPC metadata that passes a trace to the next service. None means the current context."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=context)
    return list(carrier.items())


@contextmanager
def span(
    name: str,
    parent: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> Iterator[Span]:
    """A span around a block. It becomes the current one: log lines carry its ids, `inject` its trace.

    `parent` None means the current context. An exception that leaves the block marks the span as failed. Use
    it in coroutines, but not around a `yield` of an asynchronous generator, whose end may run in another
    context.
    """
    with _tracer.start_as_current_span(name, context=parent, kind=kind, attributes=attributes) as current:
        yield current


def record_span(
    name: str,
    parent: Context | None,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> None:
    """Records a finished phase as a child of `parent` (None: of the current context's span).

    Times are nanoseconds since the Unix epoch.
    """
    _tracer.start_span(name, context=parent, start_time=start_ns, attributes=attributes).end(end_ns)


class JsonFormatter(logging.Formatter):
    """Formats each record as a one-line JSON object. Fields given as `extra` are kept."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._origin = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, with the ids of the span in which it was logged."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._origin,
        }
        current = trace.get_current_span().get_span_context()
        if current.is_valid:
            fields["trace_id"] = trace.format_trace_id(current.trace_id)
            fields["span_id"] = trace.format_span_id(current.span_id)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
            if record.exc_info[1] is not None:
                fields["error"] = _in_words(record.exc_info[1])
        for name, value in vars(record).items():
            if name not in _RECORD_FIELDS:
                fields.setdefault(name, value)
        return json.dumps(fields, default=str)


def _in_words(error: BaseException) -> str:
    """Type and message of the exception that caused this one, in one line.

    Exception groups and cancellations only pass on other exceptions, so they are not the cause.
    """
    while True:
        inner: BaseException | None = None
        if isinstance(error, BaseExceptionGroup):
            inner = next(
                (one for one in error.exceptions if not isinstance(one, CancelledError)), error.exceptions[0]
            )
        elif isinstance(error, CancelledError):
            inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    # Lines without a letter or digit, such as a table's border, carry no information.
    lines = (line.strip() for line in str(error).splitlines() if any(map(str.isalnum, line)))
    message = " ".join(" ".join(lines).split())
    if len(message) > _ERROR_CHARACTERS:
        message = f"{message[:_ERROR_CHARACTERS]}..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _configure_logs(service: str, instance: str) -> None:
    level = os.environ.get(LOG_LEVEL_VARIABLE, "").strip().upper() or "INFO"
    if level not in _LEVELS:
        raise SettingsError(f"{LOG_LEVEL_VARIABLE} must be one of {', '.join(_LEVELS)}, not {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service, instance))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda raised: _log_uncaught(
        raised.exc_type, raised.exc_value, raised.exc_traceback
    )


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None
) -> None:
    if error is not None and not issubclass(kind, KeyboardInterrupt):
        log.critical("uncaught %s", kind.__name__, exc_info=(kind, error, traceback))


def _make_tracer(service: str, instance: str) -> trace.Tracer:
    exporters = _asked_exporters("traces")
    if not exporters:
        return trace.NoOpTracer()
    try:
        provider = _trace_provider(service, instance, exporters)
    except Exception:  # The SDK can raise anything on bad OTEL_* values, and tracing must not stop serving.
        log.exception("traces are off: the OTEL_* variables cannot be used")
        return trace.NoOpTracer()
    _providers.append(provider)
    log.info("traces go to %s", ", ".join(exporters))
    return provider.get_tracer("helios")


def _make_meter(service: str, instance: str) -> metrics.Meter:
    exporters = _asked_exporters("metrics")
    if not exporters:
        return metrics.NoOpMeter("helios")
    try:
        provider = _meter_provider(service, instance, exporters)
    except Exception:  # As for traces.
        log.exception("metrics are off: the OTEL_* variables cannot be used")
        return metrics.NoOpMeter("helios")
    _providers.append(provider)
    log.info("metrics go to %s", ", ".join(exporters))
    return provider.get_meter("helios")


def _asked_exporters(signal: _Signal) -> list[str]:
    """Exporters that the environment requests (OpenTelemetry environment variable specification)."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    asked = os.environ.get(variable, "").strip().lower()
    if not asked:
        endpoints = (f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        return ["otlp"] if any(os.environ.get(name) for name in endpoints) else []
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in (*_EXPORTERS, "none"):
            known = ", ".join((*_EXPORTERS, "none"))
            log.warning("%s: %r is not known, use any of %s", variable, name, known)
    return [name for name in names if name in _EXPORTERS]


# The SDK is imported only where it is used, so that a service that sends nothing never loads it.


def _resource(service: str, instance: str) -> "Resource":
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415

    origin = {"service.name": service, "service.instance.id": instance}
    # The environment's resource attributes override the service's own.
    return Resource.create({**origin, **OTELResourceDetector().detect().attributes})


def _trace_provider(service: str, instance: str, exporters: list[str]) -> "TracerProvider":
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider(resource=_resource(service, instance), shutdown_on_exit=False)
    for name in exporters:
        provider.add_span_processor(BatchSpanProcessor(_span_exporter(name)))
    return provider


def _meter_provider(service: str, instance: str, exporters: list[str]) -> "MeterProvider":
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader  # noqa: PLC0415

    readers = [PeriodicExportingMetricReader(_metric_exporter(name)) for name in exporters]
    return MeterProvider(readers, resource=_resource(service, instance), shutdown_on_exit=False)


def _span_exporter(name: str) -> "SpanExporter":
    # stderr, because stdout is reserved for the line that says `ready`.
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # noqa: PLC0415

        return ConsoleSpanExporter(out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + "\n")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

    _check_protocol("traces")
    return OTLPSpanExporter()


def _metric_exporter(name: str) -> "MetricExporter":
    if name == "console":
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter  # noqa: PLC0415

        return ConsoleMetricExporter(out=sys.stderr, formatter=lambda data: data.to_json(indent=None) + "\n")
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter  # noqa: PLC0415

    _check_protocol("metrics")
    return OTLPMetricExporter()


def _check_protocol(signal: _Signal) -> None:
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL")
    protocol = own or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "grpc"):
        log.warning("OTLP protocol %s is not supported, sending grpc (a collector's port 4317)", protocol)
