"""Stacks that a bench starts and stops."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from helios import local_stack
from helios.stack_state import StackState

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# A bench sends the same prompts again. They must cost as much as new ones.
_NO_PREFIX_CACHE = {"HELIOS_WORKER_PREFIX_CACHE": "false"}


def bench_stack(
    *options: str, settings: Mapping[str, str] | None = None
) -> AbstractContextManager[StackState]:
    """Like `helios.local_stack.local_stack`, without a prefix cache unless the environment sets it."""
    unset = {name: value for name, value in _NO_PREFIX_CACHE.items() if name not in os.environ}
    return local_stack.local_stack(*options, settings=unset | dict(settings or {}))


def cpu_seconds(pid: int) -> float:
    """CPU time, user and system, that a process has used so far (proc(5), stat fields 14 and 15)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _CLOCK_TICKS
