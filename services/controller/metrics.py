"""The controller's metrics: breach counters, whether it leads, and how often it decides."""

from opentelemetry.metrics import CallbackOptions, Counter, Observation

from helios import telemetry
from services.controller.fleet import Fleet
from services.controller.leader import Leadership


def observe_fleet(fleet: Fleet, leadership: Leadership) -> None:
    """Registers breach counters and leadership, which are read whenever metrics are sent."""

    def cbc(_: CallbackOptions) -> list[Observation]:
        return [
            Observation(worker.window.high_exit_tokens, {"helios.worker": worker.worker_id})
            for worker in fleet.workers
        ]

    def leading(_: CallbackOptions) -> list[Observation]:
        return [Observation(int(leadership.is_held))]

    meter = telemetry.meter()
    meter.create_observable_gauge(
        "helios.controller.cbc", [cbc], "{token}", "Unsure tokens in the breach counter's window"
    )
    meter.create_observable_gauge("helios.controller.leading", [leading], "", "1 while this replica decides")


def decision_counter() -> Counter:
    """A counter of decisions, by trigger."""
    return telemetry.meter().create_counter("helios.controller.decisions", "{decision}", "Decisions made")
