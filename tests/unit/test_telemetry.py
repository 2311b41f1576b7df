"""Promises of log lines and spans. Each test uses a new process, because `configure` is per process."""

import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from opentelemetry import trace

from helios import telemetry

TRACEPARENT = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code after `configure("helios-gateway", "g1")`, with only these telemetry variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "HELIOS_"))}
    program = "from helios import telemetry\ntelemetry.configure('helios-gateway', 'g1')\n" + textwrap.dedent(
        code
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def spans(output: str) -> dict[str, dict[str, Any]]:
    """Spans that the console exporter wrote, by name."""
    return {line["name"]: line for line in lines(output) if "context" in line}


def test_log_line_says_where_when_and_how_bad() -> None:
    result = run("import logging; logging.getLogger('router').warning('lost %s', 'w1', extra={'stream': 7})")

    (line,) = lines(result.stderr)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "router",
        "message": "lost w1",
        "service": "helios-gateway",
        "instance": "g1",
        "stream": 7,
    }
    assert result.stdout == ""


def test_a_log_record_stays_one_line_whatever_it_says() -> None:
    result = run(
        """
        import logging
        try:
            raise ValueError("two\\nlines")
        except ValueError:
            logging.getLogger().exception("a\\nb \\u2028 \\ud800", extra={"message_id": object()})
        """
    )

    (line,) = lines(result.stderr)
    assert line["message"] == "a\nb \u2028 \ud800"
    assert "ValueError: two\nlines" in line["exception"]
    assert line["error"] == "ValueError: two lines"


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError('nobody caught it')",
        """
        import threading
        def fail():
            raise ValueError('nobody caught it')
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        """,
    ],
    ids=["main", "thread"],
)
def test_uncaught_exception_is_a_log_line(code: str) -> None:
    (line,) = lines(run(code).stderr)

    assert line["level"] == "CRITICAL"
    assert "ValueError: nobody caught it" in line["exception"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise ValueError", "ValueError"),
        ("raise ValueError('a table:\\n+---+\\n| x |\\n+---+')", "ValueError: a table: | x |"),
        ("raise ValueError('x' * 1000)", f"ValueError: {'x' * 500}..."),
        (
            "import asyncio; raise BaseExceptionGroup('g', [asyncio.CancelledError(), KeyError('k')])",
            "KeyError: 'k'",
        ),
        (
            """
            async def fail():
                raise OSError("the disk is full")
            async def main():
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(asyncio.sleep(600))
                    tasks.create_task(fail())
            import asyncio
            asyncio.run(main())
            """,
            "OSError: the disk is full",
        ),
        (
            """
            import asyncio
            try:
                raise OSError("the disk is full")
            except OSError:
                raise asyncio.CancelledError
            """,
            "OSError: the disk is full",
        ),
    ],
)
def test_exception_is_told_in_one_line_as_what_was_behind_it(code: str, error: str) -> None:
    (line,) = lines(run(code).stderr)
    assert line["error"] == error


def test_warnings_are_log_lines() -> None:
    (line,) = lines(run("import warnings; warnings.warn('soon gone')").stderr)

    assert line["logger"] == "py.warnings"
    assert "soon gone" in line["message"]


def test_level_comes_from_the_environment() -> None:
    code = "import logging; logging.info('said'); logging.debug('thought')"

    assert [line["message"] for line in lines(run(code).stderr)] == ["said"]
    assert len(lines(run(code, HELIOS_LOG_LEVEL="debug").stderr)) == 2
    assert run(code, HELIOS_LOG_LEVEL="ERROR").stderr == ""


def test_unknown_level_is_refused_with_the_known_ones() -> None:
    result = run("", HELIOS_LOG_LEVEL="loud")

    assert result.returncode != 0
    assert "HELIOS_LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL" in result.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},
        {
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317",
        },
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    ],
    ids=["nothing set", "disabled", "none", "empty endpoint"],
)
def test_service_that_sends_nothing_never_loads_the_sdk(environment: dict[str, str]) -> None:
    result = run(
        """
        import sys
        def observe(options):
            raise AssertionError("nobody asked")
        telemetry.meter().create_observable_gauge("running", [observe])
        telemetry.meter().create_histogram("ttft").record(1.0)
        with telemetry.span("Generate") as span:
            telemetry.record_span("queue", None, 1, 2)
            assert not span.is_recording()
            assert telemetry.inject() == []
        telemetry.shutdown()
        never = ("opentelemetry.sdk", "opentelemetry.exporter")
        print([name for name in sys.modules if name.startswith(never)])
        """,
        **environment,
    )

    assert result.stdout == "[]\n", result.stderr


def test_untraced_service_hands_a_trace_on_and_logs_its_id() -> None:
    result = run(
        f"""
        import logging
        with telemetry.span("Generate", telemetry.extract([{TRACEPARENT!r}, ("blob-bin", b"\\x00")])):
            logging.info("in the middle")
            print(telemetry.inject())
        """
    )

    assert result.stdout == f"[{TRACEPARENT!r}]\n"
    assert lines(result.stderr)[0]["trace_id"] == TRACE_ID


@pytest.mark.parametrize("metadata", [None, [], [("traceparent", "nonsense")], [("traceparent", b"00")]])
def test_metadata_without_a_trace_is_an_empty_context(
    metadata: list[tuple[str, str | bytes]] | None,
) -> None:
    assert not trace.get_current_span(telemetry.extract(metadata)).get_span_context().is_valid


def test_spans_of_a_request_share_the_callers_trace() -> None:
    result = run(
        f"""
        import logging
        parent = telemetry.extract([{TRACEPARENT!r}])
        with telemetry.span("Generate", parent, attributes={{"helios.depth": 6}}) as span:
            logging.info("in the middle")
            below = telemetry.extract(telemetry.inject())
        telemetry.record_span("decode", below, 1_000_000_000, 3_000_000_000, {{"tokens": 5}})
        telemetry.shutdown()
        """,
        OTEL_TRACES_EXPORTER="console",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test,service.instance.id=mine",
    )

    found = spans(result.stderr)
    generate, decode = found["Generate"], found["decode"]
    assert generate["context"]["trace_id"] == decode["context"]["trace_id"] == f"0x{TRACE_ID}"
    assert generate["parent_id"] == "0xb7ad6b7169203331"
    assert decode["parent_id"] == generate["context"]["span_id"]
    assert decode["start_time"] == "1970-01-01T00:00:01.000000Z"
    assert decode["end_time"] == "1970-01-01T00:00:03.000000Z"
    assert generate["attributes"] == {"helios.depth": 6}
    assert decode["attributes"] == {"tokens": 5}
    resource = generate["resource"]["attributes"]
    assert resource["service.name"] == "helios-gateway"
    assert resource["service.instance.id"] == "mine"
    assert resource["deployment.environment.name"] == "test"
    (logged,) = [line for line in lines(result.stderr) if line.get("message") == "in the middle"]
    assert f"0x{logged['span_id']}" == generate["context"]["span_id"]
    assert result.stdout == ""


def test_metrics_are_read_when_they_are_sent() -> None:
    result = run(
        """
        from opentelemetry.metrics import Observation
        running = 0
        telemetry.meter().create_observable_gauge(
            "helios.running", [lambda options: [Observation(running, {"helios.worker": "w1"})]]
        )
        running = 7
        telemetry.shutdown()
        """,
        OTEL_METRICS_EXPORTER="console",
        OTEL_RESOURCE_ATTRIBUTES="service.instance.id=mine",
    )

    (sent,) = [line for line in lines(result.stderr) if "resource_metrics" in line]
    (resource_metrics,) = sent["resource_metrics"]
    resource = resource_metrics["resource"]["attributes"]
    assert (resource["service.name"], resource["service.instance.id"]) == ("helios-gateway", "mine")
    (metric,) = resource_metrics["scope_metrics"][0]["metrics"]
    (point,) = metric["data"]["data_points"]
    assert (metric["name"], point["value"]) == ("helios.running", 7)
    assert point["attributes"] == {"helios.worker": "w1"}
    assert result.stdout == ""


def test_failed_block_is_a_failed_span() -> None:
    result = run(
        """
        try:
            with telemetry.span("Generate"):
                raise ValueError("no")
        finally:
            telemetry.shutdown()
        """,
        OTEL_TRACES_EXPORTER="console",
        OTEL_SERVICE_NAME="frontdoor",
    )

    generate = spans(result.stderr)["Generate"]
    assert generate["status"] == {"status_code": "ERROR", "description": "ValueError: no"}
    assert generate["resource"]["attributes"]["service.name"] == "frontdoor"


def test_sampler_of_the_environment_decides() -> None:
    code = "telemetry.record_span('queue', None, 1, 2); telemetry.shutdown()"
    environment = {"OTEL_TRACES_EXPORTER": "console"}

    assert "queue" in spans(run(code, **environment).stderr)
    assert spans(run(code, **environment, OTEL_TRACES_SAMPLER="always_off").stderr) == {}


def test_collector_that_is_down_neither_blocks_nor_fails_the_service() -> None:
    # Port 1 of the loopback address refuses connections. Unbounded, the exporter would retry for an hour.
    result = run(
        """
        for _ in range(5_000):
            telemetry.record_span("queue", None, 1, 2)
        telemetry.shutdown(timeout_seconds=0.5)
        """,
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
        OTEL_EXPORTER_OTLP_TIMEOUT="3600",
    )

    assert result.returncode == 0, result.stderr
    assert any("the last spans or metrics are lost" in line["message"] for line in lines(result.stderr))


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"OTEL_TRACES_EXPORTER": "carrier-pigeon"}, "carrier-pigeon"),
        ({"OTEL_METRICS_EXPORTER": "carrier-pigeon"}, "carrier-pigeon"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_COMPRESSION": "zip"}, "zip"),
        ({"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_COMPRESSION": "zip"}, "zip"),
    ],
)
def test_unusable_variables_are_named_and_the_service_goes_on(
    environment: dict[str, str], named: str
) -> None:
    result = run("print('serving')", **environment)

    assert result.stdout == "serving\n"
    (line,) = lines(result.stderr)
    assert line["level"] in {"WARNING", "ERROR"}
    assert named in line["message"] + line.get("exception", "")


def test_instance_is_host_and_process_unless_it_has_a_name() -> None:
    (line,) = lines(run("telemetry.configure('helios-worker'); import logging; logging.warning('x')").stderr)

    host, _, process = line["instance"].rpartition(":")
    assert host == socket.gethostname()
    assert process.isdecimal()


def test_extra_fields_cannot_hide_where_a_line_comes_from() -> None:
    record = logging.makeLogRecord({"msg": "hello", "levelname": "INFO", "service": "liar", "level": "liar"})

    line = json.loads(telemetry.JsonFormatter("worker", "w1").format(record))

    assert line["service"] == "worker"
    assert line["level"] == "INFO"
