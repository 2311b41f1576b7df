"""A candidate: a model loaded to be evaluated."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from helios.catalog import ModelEntry
from helios.engine.backends.kv_cache import kv_bytes
from helios.engine.backends.model import Model
from helios.engine.evaluation.prompt import fit_prompt
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.evaluation.space import Space
from helios.engine.plan import warm_up
from helios.engine.tokenizer import load_tokenizer
from helios.engine.weights.loader import load_packed
from helios.errors import CheckpointError
from helios.footprint import model_bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model loaded with all layers and exits. It is evaluated repeatedly while it is kept."""

    entry: ModelEntry
    model: Model
    tokenizer: Tokenizer
    tokenizer_id: str
    # Bytes of weights when loaded up to each exit layer.
    weight_bytes: Mapping[int, int]
    # Seconds of wall clock and of CPU that loading took.
    load_seconds: float
    load_cpu_seconds: float
    # Changes whenever the files that it was loaded from change (`catalog.checkpoint_id`).
    checkpoint: str


def load_candidate(entry: ModelEntry, settings: EvaluationSettings) -> Candidate:
    """Loads a model with all layers and exits, and warms it up.

    Raises CheckpointError naming the file, OutOfMemoryError.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    device = torch.device(settings.device)
    weights = load_packed(
        entry,
        entry.num_layers,
        entry.exit_layers,
        settings.precision_here,
        device,
        cache_dir=settings.packed_cache_dir,
        cache_bytes=settings.packed_cache_bytes,
        beside_serving=True,
    )
    model = Model(entry.config, weights, settings.block_tokens)
    # Measured without the warm-up. On a machine without kernels the warm-up compiles them, which later loads
    # skip.
    seconds = time.perf_counter() - began
    warm_up(model)
    loaded = load_tokenizer(entry.path, entry.facts)
    return Candidate(
        entry=entry,
        model=model,
        tokenizer=loaded.tokenizer,
        tokenizer_id=loaded.tokenizer_id,
        weight_bytes={depth: weights.bytes_at(depth) for depth in entry.exit_layers},
        load_seconds=seconds,
        load_cpu_seconds=time.process_time() - began_cpu,
        checkpoint=weights.checkpoint_id,
    )


def needed_bytes(entry: ModelEntry, prompts: Sequence[Sequence[int]], settings: EvaluationSettings) -> int:
    """Bytes that evaluating a model takes: its weights, and KV for the prompts and the timed steps.

    Raises InvalidRequestError for prompts that the model cannot run.
    """
    config = entry.config
    space = Space.plan(entry, [fit_prompt(prompt, entry, settings) for prompt in prompts], settings)
    block = kv_bytes(config.num_kv_heads, config.head_dim, settings.block_tokens, settings.kv_dtype)
    return model_bytes(entry, settings.precision_here) + space.num_blocks * entry.num_layers * block


def check_finite(candidate: Candidate, nats: Iterable[float], settings: EvaluationSettings) -> None:
    """Raises CheckpointError if any of these nats, which the candidate computed, is not finite."""
    if not all(map(math.isfinite, nats)):
        raise CheckpointError(
            f"{candidate.entry.path} computes no finite probabilities as {settings.precision}; fetch it again"
        )
