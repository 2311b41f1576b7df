"""The power that a computation draws."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from helios.power_meter import power_meter


@dataclass(slots=True)
class Power:
    """Mean watts of a computation, None where they are unknown, and where the figure comes from."""

    watts: float | None
    source: str


@contextmanager
def measured_power(device: str, configured_watts: float | None) -> Iterator[Power]:
    """Meters what runs inside; the result is complete afterwards. A machine without a readable meter has the
    configured watts."""
    power = Power(configured_watts, "unknown" if configured_watts is None else "configured")
    meter = power_meter(device)
    if meter is None:
        yield power
        return
    began, before = time.perf_counter(), meter.read()
    yield power
    power.watts, power.source = meter.joules_since(before) / (time.perf_counter() - began), meter.name
