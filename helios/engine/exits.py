"""How tokens leave the model: full, greedy, or dynamic."""

import enum
from collections.abc import Mapping

import torch

from helios.engine.batch import Batch
from helios.engine.decode_graphs import DecodeGraphs
from helios.engine.kv_cache import KVCache
from helios.engine.model import Model


class ExitMode(enum.StrEnum):
    """full: all layers. greedy: the first d layers, every token read out at d (the HELIOS way).
    dynamic: all layers loaded, each token read out at its own exit (the baseline)."""

    FULL = "full"
    DYNAMIC = "dynamic"
    GREEDY = "greedy"


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Probability of the top token: [rows, vocabulary] -> [rows]."""
    logits = logits.float()
    return (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()


def run_static(
    model: Model, batch: Batch, cache: KVCache, graphs: DecodeGraphs | None = None
) -> tuple[torch.Tensor, list[int]]:
    """All rows through all loaded layers. Logits [R, vocabulary] and the exit layer of each.

    `graphs` are of this model and cache, for the steps that one was captured of.
    """
    logits = None if graphs is None else graphs.run(batch)
    if logits is None:
        hidden = model.forward(batch, cache)
        logits = model.read_out(hidden[batch.read_rows], model.depth)
    return logits, [model.depth] * len(logits)


def run_dynamic(
    model: Model, batch: Batch, cache: KVCache, thresholds: Mapping[int, float]
) -> tuple[torch.Tensor, list[int]]:
    """Each decode row leaves at its first confident exit; the batch goes on for the others.

    Prefill rows walk all layers. The KV of layers that a row skips is computed from its state at the
    exit (state propagation, EE-LLM, Chen et al. 2024). `thresholds` maps the exits before the last to
    the confidence they ask for. Logits [R, vocabulary] and the exit layer of each.
    """
    hidden = model.embed(batch.token_ids, batch.positions)
    rows = batch.decode_rows
    active = torch.arange(rows, device=hidden.device)  # decode rows still in the model
    gone = active[:0]
    exit_layers = torch.full((len(batch.read_rows),), model.depth, device=hidden.device)
    exited: list[tuple[torch.Tensor, torch.Tensor]] = []  # (rows, their logits)
    running = batch
    others = torch.arange(rows, len(hidden), device=hidden.device)
    for index in range(model.depth):
        if len(gone):
            model.propagate(index, hidden[gone], batch.slots[gone], cache)
        if len(running.token_ids):
            kept = torch.cat([active, others])
            hidden[kept] = model.layer(index, hidden[kept], running, cache)
        threshold = thresholds.get(index + 1)
        if threshold is None or index + 1 == model.depth or not len(active):
            continue
        logits = model.read_out(hidden[active], index + 1)
        leaves = confidence(logits) >= threshold
        if bool(leaves.any()):
            exited.append((active[leaves], logits[leaves]))
            exit_layers[active[leaves]] = index + 1
            active = active[~leaves]
            gone = torch.cat([gone, exited[-1][0]])
            running = batch.with_decode_rows(active)
    # Decode rows come first and each is read, so row i of them is also the i-th that is read.
    remaining = (exit_layers == model.depth).nonzero()[:, 0]
    last = model.read_out(hidden[batch.read_rows[remaining]], model.depth)
    logits = last.new_empty(len(batch.read_rows), last.shape[-1])
    logits[remaining] = last
    for at, values in exited:
        logits[at] = values
    return logits, exit_layers.tolist()
