"""A plan: which model an engine serves, how deep, and how its memory is shared out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from helios import catalog
from helios.engine.batch import Batch
from helios.engine.checkpoint import ModelWeights, load_weights
from helios.engine.exits import ExitMode
from helios.engine.kv_cache import KVCache
from helios.engine.linear import quantize
from helios.engine.memory import MemoryPlan, device_budget, plan_memory
from helios.engine.model import Model
from helios.engine.precision import Precision
from helios.engine.sampler import Row, sample
from helios.engine.settings import EngineSettings
from helios.engine.threads import lend
from helios.engine.tokenizer import load_tokenizer
from helios.errors import SettingsError
from helios.sampling import SamplingParams

Progress = Callable[[int, int], None]  # layers loaded, layers in all

# The threshold of an exit that is not calibrated and not set (the paper's TH).
DEFAULT_THRESHOLD = 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine serves: a loaded partial model with its facts and its share of the memory."""

    entry: catalog.ModelEntry
    model: Model
    tokenizer: Tokenizer
    tokenizer_id: str
    # What tokenizer_id is the SHA-256 of.
    tokenizer_json: bytes
    memory: MemoryPlan
    bytes_read: int
    # Equal for the same files in the same place (`catalog.checkpoint_id`).
    checkpoint_id: str
    thresholds: dict[int, float]

    @property
    def depth(self) -> int:
        """Layers loaded."""
        return self.model.depth


def load_plan(
    path: Path,
    depth: int | None,
    settings: EngineSettings,
    progress: Progress | None = None,
    threshold: float | None = None,
) -> Plan:
    """Reads a partial model and plans its memory. `threshold` goes before the settings' own.

    Raises CheckpointError, UnknownDepthError, OutOfMemoryError, SettingsError.
    """
    entry = catalog.read_model(path)
    # Before reading: files that change meanwhile are another checkpoint.
    checkpoint_id = catalog.checkpoint_id(entry)
    depth = depth or entry.num_layers
    if settings.exit_mode is ExitMode.FULL and depth != entry.num_layers:
        raise SettingsError(
            f"exit mode full serves all {entry.num_layers} layers of {entry.name}, not {depth}; "
            "use exit mode greedy for fewer"
        )
    exits = [depth]
    if settings.exit_mode is ExitMode.DYNAMIC:
        exits = [layer for layer in entry.exit_layers if layer <= depth]
    device = torch.device(settings.device)
    precision = Precision(settings.precision).on(device)
    weights = read_weights(entry, depth, exits, precision, device, progress)
    bytes_read = weights.bytes_read
    model = Model(entry.config, weights)
    warm_up(model, settings.block_tokens)
    if threshold is None:
        threshold = settings.threshold
    calibrated = entry.facts.thresholds
    thresholds = {
        layer: calibrated.get(layer, DEFAULT_THRESHOLD) if threshold is None else threshold
        for layer in exits
        if layer < entry.num_layers
    }
    loaded = load_tokenizer(path, entry.facts)
    return Plan(
        entry=entry,
        model=model,
        tokenizer=loaded.tokenizer,
        tokenizer_id=loaded.tokenizer_id,
        tokenizer_json=loaded.tokenizer_json,
        memory=plan_memory(
            model,
            settings.memory_bytes or device_budget(device),
            settings.max_running,
            settings.step_token_budget,
            settings.block_tokens,
        ),
        bytes_read=bytes_read,
        checkpoint_id=checkpoint_id,
        thresholds=thresholds,
    )


def read_weights(
    entry: catalog.ModelEntry,
    depth: int,
    exits: Sequence[int],
    precision: Precision,
    device: torch.device,
    progress: Progress | None = None,
) -> ModelWeights:
    """The first `depth` layers as `precision` computes them. Raises as `load_weights`."""
    return load_weights(
        entry.path,
        entry.config,
        entry.facts,
        depth,
        precision.dtype,
        device=device,
        exits=exits,
        progress=progress,
        quantize=quantize if precision is Precision.INT8 else None,
    )


@torch.inference_mode()
def warm_up(model: Model, block_tokens: int) -> None:
    """Runs a token through model and sampler, so that no request waits for what first use sets up."""
    lend(compiled=model.compiled)
    config = model.config
    cache = KVCache(
        model.depth, 1, block_tokens, config.num_heads, config.head_dim, model.kv_dtype, model.device
    )
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    hidden = model.forward(Batch(zero, zero, zero, zero[None], zero, 1, block_tokens, (), zero), cache)
    sample(model.read_out(hidden, model.depth), [Row(SamplingParams(), 1, [0])])
