"""A worker's metrics: the engine's load, read when metrics are sent, and each sequence's latency."""

from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.util.types import AttributeValue

from helios import telemetry
from helios.engine.interface import PhaseTimes, ServingEngine, Telemetry
from helios.served import ServedPlan

_NANOSECONDS = 1e9
# Bounds of the histograms' buckets in seconds.
_TTFT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_BOUNDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class _Figure:
    """One figure of the load. Its metric is `helios.worker.` plus the name. The unit is a UCUM unit."""

    name: str
    unit: str
    description: str
    read: Callable[[Telemetry], int]


_GAUGES = (
    _Figure("running", "{sequence}", "Sequences in the running batch", lambda load: load.running),
    _Figure("waiting", "{sequence}", "Sequences that wait for a place in it", lambda load: load.waiting),
    _Figure("kv_blocks", "{block}", "KV blocks in the pool", lambda load: load.blocks_total),
    _Figure("kv_blocks_free", "{block}", "KV blocks that are free", lambda load: load.blocks_free),
)
_COUNTERS = (
    _Figure("steps", "{step}", "Engine steps", lambda load: load.counters.steps),
    _Figure("prefill_tokens", "{token}", "Tokens prefilled", lambda load: load.counters.prefill_tokens),
    _Figure(
        "cached_tokens",
        "{token}",
        "Tokens not computed because a sequence with the same beginning had been",
        lambda load: load.cached_tokens,
    ),
    _Figure("generated_tokens", "{token}", "Tokens generated", lambda load: load.counters.generated_tokens),
    _Figure(
        "high_exit_tokens",
        "{token}",
        "Generated tokens whose confidence was below the exit's threshold",
        lambda load: load.counters.high_exit_tokens,
    ),
    _Figure(
        "finished_sequences",
        "{sequence}",
        "Sequences that came to their end",
        lambda load: load.counters.finished_sequences,
    ),
    _Figure(
        "preemptions", "{preemption}", "Sequences put back for want of KV", lambda load: load.preemptions
    ),
)


def observe_load(engine: ServingEngine, worker_id: str) -> None:
    """Reports the engine's load, which is read only when metrics are sent."""
    meter = telemetry.meter()
    worker: dict[str, AttributeValue] = {"helios.worker": worker_id}

    def observe(figure: _Figure) -> Callable[[CallbackOptions], list[Observation]]:
        return lambda _: [Observation(figure.read(engine.telemetry()), worker)]

    def depth(_: CallbackOptions) -> list[Observation]:
        deepest: dict[str, int] = {}
        for plan in engine.telemetry().plans:
            deepest[plan.model] = max(plan.depth, deepest.get(plan.model, 0))
        return [Observation(layers, worker | {"helios.model": model}) for model, layers in deepest.items()]

    def plan_running(_: CallbackOptions) -> list[Observation]:
        return [
            Observation(running, worker | {"helios.model": plan.model, "helios.depth": plan.depth})
            for plan, running in engine.telemetry().plans.items()
        ]

    meter.create_observable_gauge("helios.worker.depth", [depth], "{layer}", "Layers loaded of the model")
    meter.create_observable_gauge(
        "helios.worker.plan_running",
        [plan_running],
        "{sequence}",
        "Sequences in the running batch under a plan",
    )
    for one in _GAUGES:
        meter.create_observable_gauge(f"helios.worker.{one.name}", [observe(one)], one.unit, one.description)
    for one in _COUNTERS:
        meter.create_observable_counter(
            f"helios.worker.{one.name}", [observe(one)], one.unit, one.description
        )


class Latency:
    """Time to the first token and time per further token of the served sequences."""

    def __init__(self) -> None:
        histogram = telemetry.meter().create_histogram
        self._ttft = histogram(
            "helios.worker.ttft",
            "s",
            "From a sequence's arrival to its first token",
            explicit_bucket_boundaries_advisory=_TTFT_BOUNDS,
        )
        self._tpot = histogram(
            "helios.worker.tpot",
            "s",
            "Time per token after the first, a sequence's mean",
            explicit_bucket_boundaries_advisory=_TPOT_BOUNDS,
        )

    def record(self, times: PhaseTimes, tokens: int, served: ServedPlan) -> None:
        """Records an ended sequence of `tokens` tokens under a plan. Without tokens it does not count."""
        if not times.first_token or not times.finished:
            return
        plan: dict[str, AttributeValue] = {"helios.model": served.model, "helios.depth": served.depth}
        self._ttft.record((times.first_token - times.submitted) / _NANOSECONDS, plan)
        if tokens > 1:
            self._tpot.record((times.finished - times.first_token) / _NANOSECONDS / (tokens - 1), plan)
