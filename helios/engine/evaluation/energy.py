"""The power that a computation draws."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from helios.power_meter import power_meter


@dataclass(slots=True)
class Power:
    """Mean watts of a computation (None: unknown), and the source of the figure."""

    watts: float | None
    source: str


@contextmanager
def measured_power(device: str, configured_watts: float | None) -> Iterator[Power]:
    """Measures the power drawn inside the block; the result is complete when the block ends.

    Without a readable meter the power is the configured watts.
    """
    power = Power(configured_watts, "unknown" if configured_watts is None else "configured")
    meter = power_meter(device)
    if meter is None:
        yield power
        return
    began, before = time.perf_counter(), meter.read()
    yield power
    power.watts, power.source = meter.joules_since(before) / (time.perf_counter() - began), meter.name
