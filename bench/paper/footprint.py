"""Memory of OPT-1.3B's shape by the engine's accounting: how many sequences fit in a fixed budget.

The bytes are computed from the configuration. Nothing is allocated, and no weights are read.
"""

from typing import Any

from bench.results import Target
from bench.systems.shapes import OPT_1_3B
from bench.systems.subject import Subject
from helios.engine.memory import MemoryPlan, share_memory
from helios.engine.weights.precision import checkpoint_dtype
from helios.errors import OutOfMemoryError
from helios.modes import Precision

_DEPTH = 6
_DTYPE = checkpoint_dtype(Precision.BFLOAT16)
_BLOCK_TOKENS = 16
_STEP_TOKEN_BUDGET = 2048
# More than fit in any budget here, so that only memory limits the batch.
_MAX_RUNNING = 2048
_GIB = 1 << 30
_BUDGETS_GIB = (4, 8, 16, 24, 40, 80)
_BATCHES = (1, 8, 64)
_BATCH_TARGET, _SAVED_TARGET = 15.0, 0.67


def measure(_subject: Subject) -> dict[str, Any]:
    """The largest batches at depth 6 of 24 (greedy) and with all layers (dynamic, full), in equal budgets."""
    smallest = _smallest_budget(OPT_1_3B.num_layers)
    rows = []
    for budget in (smallest, *(gib * _GIB for gib in _BUDGETS_GIB)):
        greedy, dynamic = _largest_batch(_DEPTH, budget), _largest_batch(OPT_1_3B.num_layers, budget)
        rows.append(
            {
                "budget_bytes": budget,
                "greedy_batch": greedy,
                "dynamic_batch": dynamic,
                "ratio": greedy / dynamic if dynamic else None,
            }
        )
    return {
        "shape": "OPT-1.3B: 24 layers x 2048, feed-forward 8192, 32 heads, vocabulary 50272",
        "assumptions": {
            "weights": "none: bytes are counted from the configuration, nothing is allocated",
            "dtype": "bfloat16, weights and KV",
            "context_tokens_per_sequence": OPT_1_3B.context_tokens,
            "block_tokens": _BLOCK_TOKENS,
            "budget": "weights, activations and KV pool together (helios/engine/memory.py); activations are "
            "those of the batch itself",
            "dynamic": "all 24 layers loaded and cached, as nobody knows where a token leaves",
        },
        "depth": _DEPTH,
        "num_layers": OPT_1_3B.num_layers,
        "largest_batch": rows,
        "same_batch": [_same_batch(batch) for batch in _BATCHES],
    }


def targets(result: dict[str, Any]) -> list[Target]:
    """The targets: the batch in the same memory, and the memory for the same batch."""
    best = max((row for row in result["largest_batch"] if row["ratio"]), key=lambda row: row["ratio"])
    others = ", ".join(
        f"{row['ratio']:.1f}x in {row['budget_bytes'] / _GIB:.0f} GiB"
        for row in result["largest_batch"][1:]
        if row["ratio"]
    )
    saved = min(row["saved"] for row in result["same_batch"])
    by_batch = ", ".join(f"{-row['saved']:.1%} at batch {row['batch']}" for row in result["same_batch"])
    return [
        Target(
            "largest batch in a fixed budget, OPT-1.3B shape, depth 6 of 24 against dynamic",
            f"at least {_BATCH_TARGET:g}x",
            f"{best['ratio']:.1f}x in {best['budget_bytes'] / _GIB:.2f} GiB "
            f"({best['greedy_batch']} against {best['dynamic_batch']}); {others}",
            best["ratio"] >= _BATCH_TARGET,
        ),
        Target(
            "weights + KV memory of the same batch, OPT-1.3B shape, depth 6 of 24 against dynamic",
            f"{-_SAVED_TARGET:.0%} or better",
            by_batch,
            saved >= _SAVED_TARGET,
        ),
    ]


def _plan(depth: int, budget: int, batch: int) -> MemoryPlan:
    weights = OPT_1_3B.parameters(depth) * _DTYPE.itemsize
    step = max(_STEP_TOKEN_BUDGET, batch)
    return share_memory(OPT_1_3B, depth, _DTYPE, _DTYPE, weights, budget, batch, step, _BLOCK_TOKENS)


def _largest_batch(depth: int, budget: int) -> int:
    """Sequences of full context that fit, each with its share of the activations. 0: none fits."""
    low, high = 0, _MAX_RUNNING
    per_sequence = -(-OPT_1_3B.context_tokens // _BLOCK_TOKENS)
    while low < high:
        batch = (low + high + 1) // 2
        try:
            fits = _plan(depth, budget, batch).num_blocks >= batch * per_sequence
        except OutOfMemoryError:
            fits = False
        low, high = (batch, high) if fits else (low, batch - 1)
    return low


def _smallest_budget(depth: int) -> int:
    """The least bytes in which one sequence of full context can be served."""
    plan = _plan(depth, _BUDGETS_GIB[-1] * _GIB, 1)
    return plan.weight_bytes + plan.activation_bytes + plan.kv_bytes_per_token * OPT_1_3B.context_tokens


def _same_batch(batch: int) -> dict[str, Any]:
    greedy, dynamic = _footprint(_DEPTH, batch), _footprint(OPT_1_3B.num_layers, batch)
    saved = 1 - greedy["total_bytes"] / dynamic["total_bytes"]
    return {"batch": batch, "greedy": greedy, "dynamic": dynamic, "saved": saved}


def _footprint(depth: int, batch: int) -> dict[str, int]:
    plan = _plan(depth, _BUDGETS_GIB[-1] * _GIB, batch)
    kv = plan.kv_bytes_per_token * OPT_1_3B.context_tokens * batch
    return {"weight_bytes": plan.weight_bytes, "kv_bytes": kv, "total_bytes": plan.weight_bytes + kv}
