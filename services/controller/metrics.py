"""The controller's metrics: breach counters, whether it leads, its router, and how often it decides."""

from collections.abc import Callable

from opentelemetry.metrics import CallbackOptions, Counter, Observation

from helios import telemetry
from helios.v1.controller_pb2 import RouterState
from services.controller.fleet import Fleet
from services.controller.leader import Leadership
from services.controller.routing.request_routing import RequestRouting


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


def observe_router(routing: RequestRouting) -> None:
    """Registers the figures of the router, which are read whenever metrics are sent."""
    meter = telemetry.meter()

    def gauge(name: str, unit: str, what: str, read: Callable[[RouterState], float | None]) -> None:
        def observe(_: CallbackOptions) -> list[Observation]:
            state = routing.state()
            value = None if state is None or not state.number else read(state)
            return [] if value is None else [Observation(value)]

        meter.create_observable_gauge(f"helios.controller.router.{name}", [observe], unit, what)

    gauge("number", "", "Number of the router that workers have", lambda state: state.number)
    gauge("examples", "{request}", "Requests that it was learnt from", lambda state: state.examples)
    gauge("price", "s", "Seconds that a nat of a token is worth", lambda state: state.price)
    gauge("bound", "1", "Rise of perplexity at which it aims", lambda state: state.bound)
    gauge("increase", "1", "Rise of perplexity that it expects", lambda state: state.expected_increase)
    gauge("error", "1", "Standard error of the rise that it expects", lambda state: state.error)
    gauge(
        "surprise",
        "{nat}",
        "Nats a token of served prompts above what was expected",
        lambda state: state.served_surprise if state.HasField("served_surprise") else None,
    )

    def shares(_: CallbackOptions) -> list[Observation]:
        state = routing.state()
        return [
            Observation(one.share, {"helios.model": one.model, "helios.depth": one.depth})
            for one in (() if state is None else state.shares)
        ]

    meter.create_observable_gauge(
        "helios.controller.router.share", [shares], "1", "Share of the last requests that a plan got"
    )


def decision_counter() -> Counter:
    """A counter of decisions, by trigger."""
    return telemetry.meter().create_counter("helios.controller.decisions", "{decision}", "Decisions made")
