"""Facts about this machine: its CPU and its memory."""

import os
import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def cpu_name() -> str:
    """The CPU model."""
    for line in _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Processor"):
            return value.strip()
    return platform.processor() or platform.machine()


def available_memory() -> int:
    """Bytes that this process can use without swapping, within the limit of its container.

    This is free memory plus reclaimable page cache (proc(5)), or what the control group still allows (cgroup
    v2), whichever is less.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _MEMINFO.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
        available = int(found[1]) * 1024 if found else available
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available)
