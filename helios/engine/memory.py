"""An engine's memory budget: weights + activations + KV cache, planned before anything is allocated.

Plans of different depth share the KV cache. Each layer has a number of blocks of its own, because a sequence
needs memory in the layers of its plan alone.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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

    # Of all loaded models. Tensors that several plans share count once.
    weight_bytes: int
    activation_bytes: int
    # Of the first plan.
    kv_bytes_per_token: int
    # By served depth, ascending: the number of blocks that have the layers up to this depth.
    blocks: Mapping[int, int]
    # Upper bound for any plans of these models: one-layer blocks that fill the whole budget.
    most_blocks: int

    @property
    def num_blocks(self) -> int:
        """Number of all blocks."""
        return next(iter(self.blocks.values()))

    @property
    def layer_blocks(self) -> tuple[int, ...]:
        """Number of blocks of each layer. None is larger than the one before it."""
        found: list[int] = []
        for depth, count in self.blocks.items():
            found += [count] * (depth - len(found))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model's name, depths and sizes."""

    name: str
    config: ModelConfig
    # The share of the served tokens that each depth is expected to hold, relative to those of other plans.
    shares: Mapping[int, float]
    # Bytes of the weights.
    weights: int
    # Types of activations, and of keys and values.
    dtype: torch.dtype
    kv: torch.dtype

    def __str__(self) -> str:
        depths = ", ".join(map(str, self.shares))
        return f"{self.name} at depth{'s' if len(self.shares) > 1 else ''} {depths}"


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """What the plans must fit into: bytes, sequences, and tokens of a step and of a block."""

    budget: int
    max_running: int
    step_token_budget: int
    block_tokens: int


def plan_memory(
    models: Sequence[tuple[str, Model, Mapping[int, float]]],
    exit_layers: Sequence[int],
    limits: MemoryLimits,
) -> MemoryPlan:
    """Fits loaded models into a budget.

    models: name, model, and the share of each depth, as in `ServedModel`. exit_layers: those of the first
    model. The pool is never larger than `max_running` sequences of full context can use. It holds at least
    one such sequence at each depth.
    Raises OutOfMemoryError if it cannot. The error names the bytes that would be enough, and for one plan the
    exit layers of the same model that fit, for several the first of them that fit.
    """

    def loaded(count: int) -> list[ServedModel]:
        """The first `count` plans."""
        found = []
        for name, model, shares in models:
            kept = dict(list(shares.items())[:count])
            count -= len(kept)
            if kept:
                deepest = max(kept)
                weights = model.weight_bytes if kept == shares else model.weights.bytes_at(deepest)
                found.append(ServedModel(name, model.config, kept, weights, model.dtype, model.kv_dtype))
        return found

    def fits(plans: Sequence[ServedModel]) -> bool:
        try:
            divide_memory(plans, limits)
        except OutOfMemoryError:
            return False
        return True

    count = sum(len(shares) for _, _, shares in models)
    wanted = loaded(count)
    try:
        return divide_memory(wanted, limits)
    except OutOfMemoryError as error:
        fewer = next((found for n in range(count - 1, 0, -1) if fits(found := loaded(n))), None)
        if fewer is not None:
            raise OutOfMemoryError(f"{error.message}; these fit: {', '.join(map(str, fewer))}") from error
        _, model, shares = models[0]
        first, least = loaded(1)[0], min(shares)

        def at(depth: int) -> ServedModel:
            return replace(first, shares={depth: 1.0}, weights=model.weights.bytes_at(depth))

        smaller = [str(depth) for depth in exit_layers if depth < least and fits([at(depth)])]
        which = "depths that fit" if count == 1 else f"depths of {first.name} that fit alone"
        choices = f"{which}: {', '.join(smaller)}" if smaller else "no smaller depth fits"
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
    """Like `plan_memory`, for one plan of a model of `weights` bytes, loaded or not.

    dtype: type of activations; kv: type of keys and values. Raises OutOfMemoryError.
    """
    limits = MemoryLimits(budget, max_running, step_token_budget, block_tokens)
    return divide_memory([ServedModel("", config, {depth: 1.0}, weights, dtype, kv)], limits)


def divide_memory(models: Sequence[ServedModel], limits: MemoryLimits) -> MemoryPlan:
    """The division of a budget among models whose keys and values have the same shape.

    Each depth gets blocks in proportion to its share. Memory that is left then gives more blocks the layers
    of deeper plans. Raises OutOfMemoryError.
    """
    first, block_tokens = models[0], limits.block_tokens
    layer_bytes = kv_bytes(first.config.num_kv_heads, first.config.head_dim, block_tokens, first.kv)
    weights = sum(model.weights for model in models)
    # Each loaded model keeps its own.
    activations = sum(
        activation_bytes(model.config, model.dtype.itemsize, limits.step_token_budget, limits.max_running)
        for model in models
    )
    # Blocks of a full context, and of as many as may run.
    least = max(-(-model.config.context_tokens // block_tokens) for model in models)
    most = limits.max_running * least
    shares = _shares_from(models)
    # Layers from each depth to the next one.
    layers = [deeper - depth for depth, deeper in zip((0, *shares), shares, strict=False)]

    def blocks(total: int, floor: int) -> list[int]:
        """Blocks of each depth if there are `total`, and `floor` of them have all layers."""
        return [max(int(total * share), floor) for share in shares.values()]

    def kv(total: int, floor: int) -> int:
        by_depth = zip(blocks(total, floor), layers, strict=True)
        return layer_bytes * sum(count * between for count, between in by_depth)

    left = limits.budget - weights - activations
    if kv(least, least) > left:
        needed = weights + activations + kv(least, least)
        is_one = len(models) == len(first.shares) == 1
        what = f"{layers[0]} layers" if is_one else " and ".join(map(str, models))
        fewer = "load fewer layers" if is_one else "serve fewer plans"
        # A block with all layers holds `block_tokens` of a context.
        fitting = left // kv(1, 1) * block_tokens
        instead = f"{fewer} or set context_tokens to at most {fitting}" if fitting > 1 else fewer
        raise OutOfMemoryError(
            f"a memory budget of {limits.budget:,} bytes cannot hold {what} ({weights:,} bytes), "
            f"activations ({activations:,}) and the KV of one full context, {least * block_tokens:,} tokens "
            f"({kv(least, least):,}); give at least {needed:,}, {instead}"
        )
    counts = range(least, most + 1)
    total = counts[bisect_right(counts, left, key=lambda count: kv(count, least)) - 1]
    floors = range(least, total + 1)
    floor = floors[bisect_right(floors, left, key=lambda count: kv(total, count)) - 1]
    return MemoryPlan(
        weight_bytes=weights,
        activation_bytes=activations,
        kv_bytes_per_token=next(iter(first.shares)) * layer_bytes // block_tokens,
        blocks=dict(zip(shares, blocks(total, floor), strict=True)),
        most_blocks=min(limits.budget // layer_bytes, most),
    )


def _shares_from(models: Sequence[ServedModel]) -> dict[int, float]:
    """By depth, ascending: the part of all shares that plans of at least this depth have."""
    by_depth: dict[int, float] = {}
    for model in models:
        for depth, share in model.shares.items():
            by_depth[depth] = by_depth.get(depth, 0.0) + share
    total = sum(by_depth.values())
    return {
        depth: sum(share for deeper, share in by_depth.items() if deeper >= depth) / total
        for depth in sorted(by_depth)
    }


def device_budget(device: torch.device) -> int:
    """Bytes of a device's memory that an engine may use by default."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(available_memory() * _CPU_SHARE)
