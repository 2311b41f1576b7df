"""The kernels that Python calls. Each names its arguments (`layout`) and calls the kernel that does the work.

Named tuples arrive here as plain tuples (`tuple(named)`), and records as arrays of one. Numba looks up
argument types by a fingerprint. For a named tuple or a single record the fingerprint takes a microsecond
longer at every call.
"""

from helios.engine.kernels.attention import attend
from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layer import run_layers
from helios.engine.kernels.layout import (
    Attention,
    BatchAddresses,
    CacheAddresses,
    Draws,
    Outputs,
    Room,
    Stop,
    Thread,
)
from helios.engine.kernels.product import plain, product
from helios.engine.kernels.quantize import quantize_groups
from helios.engine.kernels.step import run_burst
from helios.engine.kernels.summary import summarize


@compiled
def call_burst(thread, steps, model, layers, exits, is_dynamic, cache, batch, draws, stop, room):
    """Calls `run_burst`."""
    scratch, drawing, found, out = room
    run_burst(
        Thread(*thread),
        steps,
        model[0],
        layers,
        exits,
        is_dynamic,
        CacheAddresses(*cache),
        BatchAddresses(*batch),
        Draws(*draws),
        Stop(*stop),
        Room(scratch, drawing, Outputs(*found), Outputs(*out)),
    )


@compiled
def call_layers(thread, model, layers, first, last, hidden, batch, cache, scratch):
    """Calls `run_layers`."""
    named_batch, named_cache = BatchAddresses(*batch), CacheAddresses(*cache)
    run_layers(Thread(*thread), model[0], layers, first, last, hidden, named_batch, named_cache, scratch)


@compiled
def call_attend(thread, precision, attention, batch, qkv, out):
    """Calls `attend`."""
    attend(Thread(*thread), precision, Attention(*attention), BatchAddresses(*batch), qkv, out)


@compiled
def call_product(thread, precision, linear, x, rows, out, scratch):
    """Calls `product`."""
    product(Thread(*thread), precision, linear[0], x, rows, plain(linear[0], out), scratch)


@compiled
def call_summarize(thread, outputs, rows, width):
    """Calls `summarize`."""
    summarize(Thread(*thread), Outputs(*outputs), rows, width)


@compiled
def call_quantize(rows, inputs, x, numbers, scales):
    """Calls `quantize_groups`, in one thread."""
    quantize_groups(rows, inputs, x, numbers, scales)
