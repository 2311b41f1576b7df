"""CPU threads of the engine's process."""

import sys

import torch

from helios.engine.team import TEAM

# Python's default of 5 ms would let the engine's thread keep the event loop waiting that long.
_SWITCH_SECONDS = 0.0005


def set_threads(threads: int) -> None:
    """Gives computations `threads` CPU threads, and lets other Python threads run in between."""
    torch.set_num_threads(threads)
    TEAM.threads = 1
    sys.setswitchinterval(_SWITCH_SECONDS)


def get_threads() -> int:
    """CPU threads of computations."""
    return max(torch.get_num_threads(), TEAM.threads)


def lend(compiled: bool) -> None:
    """Gives the threads to what computes: the team of compiled code, or torch.

    Not to both: torch's spin for a while after each operation, where a team's next call is to run.
    """
    threads = get_threads()
    TEAM.threads = threads if compiled else 1
    torch.set_num_threads(1 if compiled else threads)
