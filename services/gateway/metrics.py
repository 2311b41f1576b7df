"""The gateway's metrics: its open streams, how streams ended, and which plans served them."""

from opentelemetry.metrics import CallbackOptions, Observation

from helios import telemetry
from helios.v1 import generation_pb2
from services.gateway.admission import Admission


class StreamMetrics:
    """Counts of streams. Recording does nothing unless metrics are enabled."""

    def __init__(self, admission: Admission) -> None:
        meter = telemetry.meter()

        def open_streams(_: CallbackOptions) -> list[Observation]:
            return [Observation(admission.open_streams)]

        def queued_streams(_: CallbackOptions) -> list[Observation]:
            return [Observation(admission.queued_streams)]

        meter.create_observable_gauge(
            "helios.gateway.open_streams", [open_streams], "{stream}", "Admitted and not ended"
        )
        meter.create_observable_gauge(
            "helios.gateway.queued_streams", [queued_streams], "{stream}", "Waiting for their first token"
        )
        self._streams = meter.create_counter("helios.gateway.streams", "{stream}", "Streams that have ended")
        self._resumes = meter.create_counter(
            "helios.gateway.resumes", "{resume}", "Times that a stream went on at another worker"
        )
        self._redirects = meter.create_counter(
            "helios.gateway.redirects", "{redirect}", "Times that a stream's plan was in force elsewhere"
        )
        self._plan_streams = meter.create_counter(
            "helios.gateway.plan_streams", "{stream}", "Streams that came to their end under a plan"
        )

    def ended(self, status: str) -> None:
        """Records that one stream has ended with this gRPC status."""
        self._streams.add(1, {"helios.status": status})

    def finished(self, finish: generation_pb2.Finish) -> None:
        """Records under which plan a stream came to its end."""
        self._plan_streams.add(1, {"helios.model": finish.model, "helios.depth": finish.depth})

    def moved(self, resumed: int, redirected: int) -> None:
        """Records that a stream has ended that was resumed and redirected this many times."""
        self._resumes.add(resumed)
        self._redirects.add(redirected)
