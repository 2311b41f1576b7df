"""Traces every exit of a model at each position of given texts. All quality figures rest on these traces.

In `full` and `greedy` every token goes through the same layers, so one run gives the exact results of the
last layer and of each depth d. In `dynamic` the KV of skipped layers is propagated, so that mode needs its
own run.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from helios.engine.backends.burst import ONE_STEP
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.readout import read, read_on_device
from helios.engine.evaluation.space import sequence_of
from helios.engine.plan import Plan
from helios.engine.scheduling.batch import build_batch
from helios.engine.scheduling.block_pool import BlockPool

# Positions whose logits are held at once.
_ROWS = 64
# Texts that run with dynamic exits in one batch.
_GROUP = 32


@dataclass(frozen=True, slots=True)
class ExitTrace:
    """Every exit on one text of n tokens, [exits, n - 1]. At position p the next token is token p + 1."""

    exit_layers: tuple[int, ...]
    top_ids: NDArray[np.int32]
    confidences: NDArray[np.float32]
    # Nats of the text's own next token.
    nats: NDArray[np.float32]

    def index(self, depth: int) -> int:
        """The row of an exit layer. Raises ValueError for a layer that is not an exit."""
        return self.exit_layers.index(depth)

    def agrees(self, depth: int) -> NDArray[np.bool_]:
        """Where the exit's top token equals the last layer's, [n - 1]."""
        return np.asarray(self.top_ids[self.index(depth)] == self.top_ids[-1])


@dataclass(frozen=True, slots=True)
class DynamicTrace:
    """Dynamic exits on texts, from token `prefix` of each on. Each field is [texts, n - prefix]."""

    exit_layers: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    nats: NDArray[np.float32]


@torch.inference_mode()
def trace_exits(plan: Plan, texts: Sequence[Sequence[int]]) -> list[ExitTrace]:
    """Runs each text through all layers of `plan`, loaded with every exit (exit mode dynamic)."""
    model, exit_layers = plan.model, plan.entry.exit_layers
    cache, pool = _space(plan, max(map(len, texts)))
    traces = []
    for text in texts:
        blocks = pool.allocate(pool.blocks_for(len(text)))
        sequence = sequence_of(plan.served, plan.tokenizer, text, blocks)
        batch, _ = build_batch([(sequence, len(text))], model.block_tokens, model.device)
        hidden, targets = model.embed(batch.token_ids, batch.positions), batch.token_ids[1:]
        columns = []
        for first, last in itertools.pairwise((0, *exit_layers)):
            hidden = model.layers(first, last, hidden, batch, cache)
            parts = [
                _read(model.read_out(hidden[start : start + _ROWS], last), targets[start:])
                for start in range(0, len(targets), _ROWS)
            ]
            columns.append([torch.cat(column) for column in zip(*parts, strict=True)])
        top_ids, confidences, nats = (torch.stack(column).numpy() for column in zip(*columns, strict=True))
        traces.append(ExitTrace(exit_layers, top_ids.astype(np.int32), confidences, nats))
        pool.free(sequence.blocks)
    return traces


@torch.inference_mode()
def trace_dynamic(
    plan: Plan, texts: Sequence[Sequence[int]], prefix: int, thresholds: Mapping[int, float]
) -> DynamicTrace:
    """Runs texts of one length token by token, as the engine serves them: each token leaves at its own exit.

    The first `prefix` tokens are the prompt, which goes through all layers.
    """
    groups = [
        _walk(plan, texts[first : first + _GROUP], prefix, thresholds)
        for first in range(0, len(texts), _GROUP)
    ]
    exit_layers, top_ids, nats = (np.concatenate(column) for column in zip(*groups, strict=True))
    return DynamicTrace(exit_layers, top_ids, nats)


def _walk(
    plan: Plan, texts: Sequence[Sequence[int]], prefix: int, thresholds: Mapping[int, float]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """One batch of `trace_dynamic`."""
    length = len(texts[0])
    block_tokens = plan.model.block_tokens
    cache, pool = _space(plan, (length + block_tokens) * len(texts))
    sequences = [
        sequence_of(plan.served, plan.tokenizer, text[:prefix], pool.allocate(pool.blocks_for(length)))
        for text in texts
    ]
    exits, top_ids, nats = [], [], []
    for position in range(prefix, length):
        scheduled = [(sequence, sequence.pending) for sequence in sequences]
        batch, _ = build_batch(scheduled, block_tokens, plan.model.device)
        found, exit_layers = plan.model.backend.step_dynamic(batch, cache, thresholds, ONE_STEP)
        top, _, cost = _read(found.logits, torch.tensor([text[position] for text in texts]))
        exits.append(exit_layers)
        top_ids.append(top.numpy())
        nats.append(cost.numpy())
        for sequence, text in zip(sequences, texts, strict=True):
            sequence.computed = len(sequence.token_ids)
            sequence.token_ids.append(text[position])
    # [steps, texts] -> [texts, steps]
    return np.array(exits, np.int32).T, np.array(top_ids, np.int32).T, np.array(nats, np.float32).T


def _read(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top tokens, confidences and nats of `targets`, for each row that has a target."""
    count = min(len(logits), len(targets))
    summarized = read if logits.device.type == "cpu" else read_on_device
    found = summarized(logits[:count])
    known = found.logits.gather(1, targets[:count, None].to(logits.device))[:, 0]
    return found.best.cpu(), found.confidences.cpu(), (found.normalizers - known).cpu()


def _space(plan: Plan, tokens: int) -> tuple[KVCache, BlockPool]:
    """A KV cache for this many tokens, and its block pool."""
    model, block_tokens = plan.model, plan.model.block_tokens
    num_blocks = -(-tokens // block_tokens)
    cache = KVCache.of(model.config, model.depth, num_blocks, block_tokens, model.kv_dtype, model.device)
    return cache, BlockPool(num_blocks, block_tokens)
