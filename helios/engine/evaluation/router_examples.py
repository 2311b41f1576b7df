"""Evaluates a candidate for the router alone: what one prompt under one model teaches it.

Each prompt runs once through all layers. Only what `ModelExample` holds is read out, so this takes a fraction
of the time of `evaluate`.
"""

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.backends.readout import read, read_on_device
from helios.engine.evaluation.candidate import Candidate, check_finite
from helios.engine.evaluation.evaluate import Progress
from helios.engine.evaluation.pace import Pace
from helios.engine.evaluation.prompt import fit_prompt
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.evaluation.space import Space
from helios.engine.scheduling.batch import build_batch
from helios.engine.scheduling.sequence import Sequence
from helios.routing.example import ModelExample
from helios.routing.probe import read_positions

# A shorter prompt says too little: its beginning and its rest have at least half as many tokens.
LEAST_TOKENS = 24

# Positions whose logits are held at once, so that [rows, vocabulary] stays small beside the weights.
_ROWS = 64
# Decimals of the nats of single tokens, which are most of an example in JSON.
_DECIMALS = 4


def evaluate_for_router(
    candidate: Candidate,
    prompts: Seq[Seq[int]],
    names: Seq[str],
    settings: EvaluationSettings,
    progress: Progress | None = None,
    pace: Pace | None = None,
) -> list[ModelExample]:
    """An example for each prompt (token ids) of at least LEAST_TOKENS tokens. Works in the caller's thread.

    names: one per prompt, the same for every candidate.

    Raises InvalidRequestError for prompts that cannot be run, CheckpointError for weights whose probabilities
    are not finite, CancelledError once `pace` is stopped.
    """
    pace = pace or Pace()
    fitted = [fit_prompt(prompt, candidate.entry, settings) for prompt in prompts]
    chosen = [(name, ids) for name, ids in zip(names, fitted, strict=True) if len(ids) >= LEAST_TOKENS]
    if not chosen:
        return []
    # The prompts follow one another in the same blocks.
    longest = max((ids for _, ids in chosen), key=len)
    space = Space.plan(candidate.entry, [longest], settings, timing=False)
    cache = space.cache(candidate.model)
    examples = []
    for done, (name, ids) in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        (sequence,) = space.sequences(candidate.tokenizer, [ids])
        examples.append(_example(candidate, cache, sequence, name, settings))
        pace.rest()
    if progress is not None:
        progress(len(chosen), len(chosen))
    return examples


def _example(
    candidate: Candidate, cache: KVCache, sequence: Sequence, name: str, settings: EvaluationSettings
) -> ModelExample:
    ids = sequence.token_ids
    first_tokens = min(settings.probe_tokens, len(ids) // 2)
    probed = np.array(read_positions(first_tokens, settings.probe_readings))
    # The same positions at every exit, so that chance hardly touches the differences between exits.
    rest = np.arange(first_tokens, len(ids) - 1, settings.router_stride)
    exits = candidate.entry.exit_layers
    positions = dict.fromkeys(exits, rest)
    positions[exits[0]] = np.concatenate([probed, rest])
    # Where the last exit is also the first one, these include all others.
    positions[exits[-1]] = np.arange(len(ids) - 1)
    nats = _nats(candidate.model, cache, sequence, positions)
    first_nats, rest_nats = float(nats[0, probed].mean()), nats[:, rest].mean(axis=1).tolist()
    token_nats = nats[-1].round(_DECIMALS).tolist()
    check_finite(candidate, [first_nats, *rest_nats, *token_nats], settings)
    return ModelExample(
        id=name,
        ids=tuple(ids),
        first_tokens=first_tokens,
        first_nats=first_nats,
        rest_nats=tuple(rest_nats),
        token_nats=tuple(token_nats),
    )


@torch.inference_mode()
def _nats(
    model: Model, cache: KVCache, sequence: Sequence, positions: Mapping[int, NDArray[np.int64]]
) -> NDArray[np.float64]:
    """Nats of the sequence's own next token, [exits, tokens - 1]. NaN where nothing was read.

    positions: those that are read, by exit layer, ascending.
    """
    targets = torch.tensor(sequence.token_ids[1:], device=model.device)
    # Nothing follows the last token, so it need not be computed.
    batch, _ = build_batch([(sequence, len(targets))], model.block_tokens, model.device)
    summarized = read if model.device.type == "cpu" else read_on_device
    hidden = model.embed(batch.token_ids, batch.positions)
    found = np.full((len(positions), len(targets)), np.nan)
    for index, (first, last) in enumerate(itertools.pairwise((0, *positions))):
        hidden = model.layers(first, last, hidden, batch, cache)
        for start in range(0, len(positions[last]), _ROWS):
            at = positions[last][start : start + _ROWS]
            rows = torch.from_numpy(at).to(model.device)
            readout = summarized(model.read_out(hidden[rows], last))
            own = readout.logits.gather(1, targets[rows, None])[:, 0]
            found[index, at] = (readout.normalizers - own).cpu().numpy()
    return found
