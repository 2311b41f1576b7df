"""A loaded plan: a model at a depth, the runner of its steps, and its division of memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from helios import catalog
from helios.calibration import DEFAULT_THRESHOLD
from helios.engine.backends.burst import ONE_STEP
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.backends.runner import Runner, choose_runner
from helios.engine.backends.sampler import Row, Sampled, sample
from helios.engine.interface import Progress
from helios.engine.memory import MemoryPlan, device_budget, plan_memory
from helios.engine.scheduling.batch import Batch
from helios.engine.settings import EngineSettings
from helios.engine.tokenizer import load_tokenizer
from helios.engine.weights.loader import load_packed
from helios.engine.weights.part_reader import load_weights
from helios.engine.weights.precision import precision_on
from helios.errors import CheckpointError, SettingsError
from helios.modes import ExitMode, Precision
from helios.sampling import SamplingParams
from helios.served import ServedPlan


@dataclass(frozen=True, slots=True)
class Plan:
    """A loaded partial model with its runner, its facts and its memory plan."""

    entry: catalog.ModelEntry
    model: Model
    runner: Runner
    tokenizer: Tokenizer
    tokenizer_id: str
    # Its SHA-256 is tokenizer_id.
    tokenizer_json: bytes
    memory: MemoryPlan
    # By exit layer, the confidence below which a token counts as unsure. The model's last layer has none.
    thresholds: dict[int, float]

    @property
    def served(self) -> ServedPlan:
        """The plan's name: sequences refer to the plan by it."""
        return ServedPlan(model=self.entry.name, depth=self.depth)

    @property
    def depth(self) -> int:
        """Number of loaded layers."""
        return self.model.depth

    @property
    def bytes_read(self) -> int:
        """Bytes read to load the weights. Weights shared with the previous plan were not read again."""
        return self.model.weights.bytes_read

    @property
    def checkpoint_id(self) -> str:
        """Equal for the same files at the same path (`catalog.checkpoint_id`)."""
        return self.model.weights.checkpoint_id

    def not_finite(self, exit_layers: Sequence[int], confidences: Sequence[float]) -> CheckpointError:
        """The error for a sequence with probabilities that are not finite. Arguments are per token."""
        pairs = zip(exit_layers, confidences, strict=False)
        layer = next((layer for layer, found in pairs if not math.isfinite(found)), exit_layers[-1])
        return _not_finite(self.entry.name, layer, self.model.weights.precision)


def _not_finite(name: str, layer: int, precision: str) -> CheckpointError:
    return CheckpointError(
        f"{name} computes NaN or infinity instead of probabilities at the exit after layer {layer}: numbers "
        f"become too large in {precision}. Choose another precision or another checkpoint"
    )


def check_model(entry: catalog.ModelEntry) -> None:
    """Raises CheckpointError unless `load_plan` can load every depth of a model, with every exit.

    Reads everything that such loads read, and keeps nothing.
    """
    load_tokenizer(entry.path, entry.facts)
    load_weights(
        entry.path,
        entry.config,
        entry.facts,
        entry.num_layers,
        torch.float32,
        device=torch.device("meta"),
        exits=entry.exit_layers,
    )


def load_plan(
    path: Path,
    depth: int | None,
    settings: EngineSettings,
    progress: Progress | None = None,
    threshold: float | None = None,
    running: Plan | None = None,
    *,
    urgent: bool = False,
) -> Plan:
    """Loads a partial model and plans its memory. `threshold` overrides the settings' value.

    running: the plan that is served meanwhile. Loading yields to it unless `urgent`. Plans of the same
    checkpoint share weights.

    Raises CheckpointError, UnknownDepthError, OutOfMemoryError, SettingsError.
    """
    entry = catalog.read_model(path)
    depth = depth or entry.num_layers
    if settings.exit_mode is ExitMode.FULL and depth != entry.num_layers:
        raise SettingsError(
            f"exit mode full serves all {entry.num_layers} layers of {entry.name}, not {depth}; "
            "use exit mode greedy for fewer"
        )
    exits = [depth]
    if settings.exit_mode is ExitMode.DYNAMIC:
        exits = [layer for layer in entry.exit_layers if layer <= depth]
    # A probe reads out at the first exit.
    heads = {*exits, entry.exit_layers[0]} if settings.probe_tokens else exits
    device = torch.device(settings.device)
    precision = precision_on(Precision(settings.precision), device)
    weights = load_packed(
        entry,
        depth,
        sorted(heads),
        precision,
        device,
        cache_dir=settings.packed_cache_dir,
        cache_bytes=settings.packed_cache_bytes,
        running=None if running is None else running.model.weights,
        beside_serving=running is not None and not urgent,
        progress=progress,
    )
    model = Model(entry.config, weights, settings.block_tokens)
    warm = warm_up(model)
    if not math.isfinite(warm.confidences[0]):
        raise _not_finite(entry.name, depth, precision)
    if threshold is None:
        threshold = settings.threshold
    calibrated = entry.facts.thresholds
    thresholds = {
        layer: calibrated.get(layer, DEFAULT_THRESHOLD) if threshold is None else threshold
        for layer in exits
        if layer < entry.num_layers
    }
    loaded = load_tokenizer(path, entry.facts)
    is_dynamic = settings.exit_mode is ExitMode.DYNAMIC
    return Plan(
        entry=entry,
        model=model,
        runner=choose_runner(
            model,
            thresholds if is_dynamic else None,
            cuda_graphs=settings.cuda_graphs,
            most_rows=settings.max_running,
        ),
        tokenizer=loaded.tokenizer,
        tokenizer_id=loaded.tokenizer_id,
        tokenizer_json=loaded.tokenizer_json,
        memory=plan_memory(
            model,
            entry.exit_layers,
            settings.memory_bytes or device_budget(device),
            settings.max_running,
            settings.step_token_budget,
            settings.block_tokens,
        ),
        thresholds=thresholds,
    )


@torch.inference_mode()
def warm_up(model: Model) -> Sampled:
    """Computes and samples one token, so that no request waits for set-up work at first use.

    Returns the sampled token.
    """
    cache = KVCache.of(model.config, model.depth, 1, model.block_tokens, model.kv_dtype, model.device)
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    batch = Batch.of(zero, zero, zero, zero[None], zero, 1, model.block_tokens, (), zero)
    # After a probe, prefill goes on with the layers alone.
    model.layers(0, 1, model.embed(zero, zero), batch, cache)
    found = model.backend.step(batch, cache, model.depth, ONE_STEP)
    return sample(found, {0: Row(SamplingParams(temperature=1.0), 1, [0])})
