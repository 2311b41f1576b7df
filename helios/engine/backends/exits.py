"""How tokens leave the model: full, greedy, or dynamic."""

import itertools
from collections.abc import Mapping

import torch

from helios.engine.backends.burst import ONE_STEP, Burst
from helios.engine.backends.cuda_graphs import DecodeGraphs
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.backends.readout import Readout, read
from helios.engine.scheduling.batch import Batch


def run_static(
    model: Model, batch: Batch, cache: KVCache, graphs: DecodeGraphs | None = None, burst: Burst = ONE_STEP
) -> tuple[Readout, list[int]]:
    """All rows through all loaded layers. What the read rows read out, and the exit layer of each.

    `graphs` are of this model and cache, for the steps that one was captured of. burst: as in `Model.step`.
    """
    found = None if graphs is None else graphs.run(batch)
    if found is None:
        found = model.step(batch, cache, model.depth, burst)
    return found, [model.depth] * len(found.best)


def run_dynamic(
    model: Model, batch: Batch, cache: KVCache, thresholds: Mapping[int, float], burst: Burst = ONE_STEP
) -> tuple[Readout, list[int]]:
    """Each decode row leaves at its first confident exit; the batch goes on for the others.

    Prefill rows walk all layers. The KV of layers that a row skips is computed from its state at the
    exit (state propagation, EE-LLM, Chen et al. 2024). `thresholds` maps the exits before the last to
    the confidence they ask for. What the read rows read out, and the exit layer of each.
    burst: as in `Model.step`.
    """
    compiled = model.step_dynamic(batch, cache, thresholds, burst)
    if compiled is not None:
        return compiled
    hidden = model.embed(batch.token_ids, batch.positions)
    # Decode rows still in the model; `hidden` and `running` have these and the prefill rows behind them.
    active = torch.arange(batch.decode_rows, device=hidden.device)
    running = batch
    exit_layers = torch.full((len(batch.read_rows),), model.depth, device=hidden.device)
    exited: list[tuple[torch.Tensor, Readout]] = []  # (rows, what they read out)
    stops = sorted(layer for layer in thresholds if layer < model.depth)
    for first, last in itertools.pairwise((0, *stops, model.depth)):
        hidden = model.layers(first, last, hidden, running, cache)
        if last == model.depth or not len(active):
            continue
        found = read(model.read_out(hidden[: len(active)], last))
        leaves = found.confidences >= thresholds[last]
        if not bool(leaves.any()):
            continue
        rows = active[leaves]
        exited.append((rows, found.rows(leaves)))
        exit_layers[rows] = last
        model.propagate(last, hidden[: len(active)][leaves], batch.slots[rows], cache)
        hidden = torch.cat([hidden[: len(active)][~leaves], hidden[len(active) :]])
        active = active[~leaves]
        if not len(hidden):
            break
        running = batch.with_decode_rows(active)
    # Decode rows come first and each is read, so row i of them is also the i-th that is read.
    remaining = (exit_layers == model.depth).nonzero()[:, 0]
    if len(remaining) or not exited:
        prefilled = batch.read_rows[batch.decode_rows :] - (batch.decode_rows - len(active))
        at = torch.cat([torch.arange(len(active), device=hidden.device), prefilled])
        exited.append((remaining, read(model.read_out(hidden[at], model.depth))))
    order = torch.cat([rows for rows, _ in exited]).argsort()
    return Readout.joined([found for _, found in exited], order), exit_layers.tolist()
