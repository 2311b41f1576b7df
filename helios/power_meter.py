"""Energy meters of this machine: NVML for a GPU, RAPL for CPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")
_MICRO, _MILLI = 1e-6, 1e-3


@dataclass(frozen=True, slots=True)
class PowerMeter:
    """Counters of consumed energy. They count everything that runs on the device, not only one process."""

    name: str
    # Joules: one reading per counter.
    read: Callable[[], tuple[float, ...]]
    # The value in joules at which each counter restarts from zero.
    wraps_at: tuple[float, ...]

    def joules_since(self, start: tuple[float, ...]) -> float:
        """Joules since the readings `start`. Each counter may have wrapped at most once."""
        counters = zip(start, self.read(), self.wraps_at, strict=True)
        return sum((now - then) % wrap for then, now, wrap in counters)


def power_meter(device: str, powercap: Path = _POWERCAP) -> PowerMeter | None:
    """The meter of a torch device (`cpu`, `cuda`, `cuda:1`). None if no meter is readable here."""
    if device.startswith("cuda"):
        return _nvml_meter(int(device.partition(":")[2] or 0))
    return _rapl_meter(powercap)


def _nvml_meter(index: int) -> PowerMeter | None:
    import pynvml  # noqa: PLC0415  # Only where there is a GPU.

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return PowerMeter(
        f"nvml {index}",
        lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * _MILLI,),
        (2**64 * _MILLI,),
    )


def _rapl_meter(powercap: Path) -> PowerMeter | None:
    """All CPU packages together. Domains inside a package (`intel-rapl:0:1`) are already included in it."""
    packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]
    if not packages:
        return None

    def read(file: str = "energy_uj") -> tuple[float, ...]:
        return tuple(int((package / file).read_text()) * _MICRO for package in packages)

    try:
        read()
        wraps_at = read("max_energy_range_uj")
    except (OSError, ValueError):
        # Newer kernels let only root read it (CVE-2020-8694).
        return None
    return PowerMeter(" ".join(package.name for package in packages), read, wraps_at)
