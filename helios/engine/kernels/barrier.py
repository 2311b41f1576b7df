"""How the threads of a call divide its work, and where they wait for each other."""

from numba import types

from helios.engine.kernels.jit import compiled
from helios.engine.kernels.simd import add_shared, load_shared, store_shared

_yield = types.ExternalFunction("sched_yield", types.int32())
# Looks at a barrier before a thread lets others on its processor go first.
_SPINS = 2000


@compiled
def share(thread, count):
    """Start and end of a thread's share of `count` items."""
    return count * thread.number // thread.threads, count * (thread.number + 1) // thread.threads


@compiled
def meet(thread):
    """Waits until all threads of the call have arrived here."""
    if thread.threads == 1:
        return
    barrier = thread.barrier
    meeting = load_shared(barrier, 1)
    if add_shared(barrier, 0, 1) == thread.threads - 1:
        store_shared(barrier, 0, 0)
        store_shared(barrier, 1, meeting + 1)
        return
    spins = 0
    while load_shared(barrier, 1) == meeting:
        spins += 1
        if spins > _SPINS:
            _yield()
