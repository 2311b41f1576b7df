"""An engine's memory budget: weights + activations + KV cache, planned before anything is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from helios.architectures.spec import ModelConfig
from helios.engine.backends.kv_cache import kv_bytes
from helios.engine.backends.model import Model
from helios.errors import OutOfMemoryError
from helios.footprint import activation_bytes
from helios.hardware import available_memory

# Shares of the memory that is free when an engine starts. The rest is for the system, other workers and
# reloads, during which old and new weights are both in memory for a moment.
_CPU_SHARE = 0.4
_GPU_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each part of the budget, and the resulting number of KV blocks."""

    weight_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    num_blocks: int
    # Upper bound for any plan of the model: one-layer blocks that fill the whole budget.
    most_blocks: int


def plan_memory(
    model: Model,
    exit_layers: Sequence[int],
    budget: int,
    max_running: int,
    step_token_budget: int,
    block_tokens: int,
) -> MemoryPlan:
    """Fits a loaded model into `budget` bytes.

    The pool is never larger than `max_running` sequences of full context can use.
    Raises OutOfMemoryError when not even one such sequence fits. The error names the bytes that would be
    enough, and the exit layers of the same model that fit.
    """

    def share(depth: int) -> MemoryPlan:
        return share_memory(
            model.config,
            depth,
            model.dtype,
            model.kv_dtype,
            model.weight_bytes if depth == model.depth else model.weights.bytes_at(depth),
            budget,
            max_running,
            step_token_budget,
            block_tokens,
        )

    def fits(depth: int) -> bool:
        try:
            share(depth)
        except OutOfMemoryError:
            return False
        return True

    try:
        return share(model.depth)
    except OutOfMemoryError as error:
        smaller = [str(depth) for depth in exit_layers if depth < model.depth and fits(depth)]
        choices = f"depths that fit: {', '.join(smaller)}" if smaller else "no smaller depth fits"
        raise OutOfMemoryError(f"{error.message}; {choices}") from error


def share_memory(
    config: ModelConfig,
    depth: int,
    dtype: torch.dtype,
    kv: torch.dtype,
    weights: int,
    budget: int,
    max_running: int,
    step_token_budget: int,
    block_tokens: int,
) -> MemoryPlan:
    """Like `plan_memory`, for a model of `weights` bytes, loaded or not. Raises OutOfMemoryError.

    dtype: type of activations; kv: type of keys and values.
    """
    block_bytes = depth * kv_bytes(config.num_kv_heads, config.head_dim, block_tokens, kv)
    activations = activation_bytes(config, dtype.itemsize, step_token_budget, max_running)
    blocks_per_context = -(-config.context_tokens // block_tokens)
    contexts = max_running * blocks_per_context
    num_blocks = min((budget - weights - activations) // block_bytes, contexts)
    if num_blocks < blocks_per_context:
        needed = weights + activations + blocks_per_context * block_bytes
        raise OutOfMemoryError(
            f"a memory budget of {budget:,} bytes cannot hold {depth} layers ({weights:,} bytes), "
            f"activations ({activations:,}) and one full context of KV "
            f"({blocks_per_context * block_bytes:,}); give at least {needed:,} or load fewer layers"
        )
    most_blocks = min(budget * depth // block_bytes, contexts)
    return MemoryPlan(weights, activations, block_bytes // block_tokens, num_blocks, most_blocks)


def device_budget(device: torch.device) -> int:
    """Bytes of a device's memory that an engine may use by default."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(available_memory() * _CPU_SHARE)
