"""Loaded plans: models, each at one or more depths, the runners of their steps, and their memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from helios import catalog
from helios.calibration import DEFAULT_THRESHOLD
from helios.chat_template import ChatTemplate, check_chat_template, read_chat_template
from helios.engine.backends.burst import ONE_STEP
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.backends.runner import Runner, choose_runner
from helios.engine.backends.sampler import Row, Sampled, sample
from helios.engine.interface import PlanToLoad, Progress
from helios.engine.memory import MemoryLimits, MemoryPlan, device_budget, plan_memory
from helios.engine.scheduling.batch import Batch
from helios.engine.settings import EngineSettings
from helios.engine.tokenizer import LoadedTokenizer, load_tokenizer
from helios.engine.weights.loader import load_packed
from helios.engine.weights.part_reader import load_weights
from helios.engine.weights.precision import precision_on
from helios.errors import CheckpointError, InvalidRequestError, SettingsError
from helios.modes import ExitMode, Precision
from helios.sampling import SamplingParams
from helios.served import ServedPlan


@dataclass(frozen=True, slots=True)
class Plan:
    """A loaded model at one of its served depths, with its runner, its facts and its memory plan.

    Plans of one model share its weights and its runner.
    """

    entry: catalog.ModelEntry
    # The plan's name: sequences refer to the plan by it.
    served: ServedPlan
    # Loaded to the deepest of its plans.
    model: Model
    runner: Runner
    tokenizer: Tokenizer
    tokenizer_id: str
    # Its SHA-256 is tokenizer_id.
    tokenizer_json: bytes
    # None: the model has none.
    chat_template: ChatTemplate | None
    # Of all plans that are served together.
    memory: MemoryPlan
    # By exit layer of any plan of the model, the confidence below which a token counts as unsure. The model's
    # last layer has none.
    thresholds: Mapping[int, float]

    @property
    def depth(self) -> int:
        """Number of layers that its sequences go through."""
        return self.served.depth

    @property
    def bytes_read(self) -> int:
        """Bytes read to load its model. Weights shared with earlier plans were not read again."""
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
    check_chat_template(entry.path, entry.name)
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
) -> Plan:
    """Loads a single plan. `threshold` overrides the settings' value. Everything else is as in `load_plans`.

    Raises CheckpointError, UnknownDepthError, OutOfMemoryError, SettingsError.
    """
    one = PlanToLoad(path, depth, threshold)
    (plan,) = load_plans([one], settings, progress, () if running is None else (running,))
    return plan


def load_plans(
    wanted: Sequence[PlanToLoad],
    settings: EngineSettings,
    progress: Progress | None = None,
    running: Sequence[Plan] = (),
    *,
    urgent: bool = False,
) -> tuple[Plan, ...]:
    """Loads plans that are served together, and plans their memory. Returns them in the same order.

    A model is loaded once, to its deepest plan.
    running: the plans that are served meanwhile. Loading yields to them unless `urgent`. Plans of the same
    checkpoint share weights.

    Raises CheckpointError, UnknownDepthError, OutOfMemoryError, SettingsError, InvalidRequestError.
    """
    models = _by_model(wanted, settings.context_tokens)
    if len(wanted) > 1 and settings.exit_mode is not ExitMode.GREEDY:
        raise SettingsError(
            f"exit mode {settings.exit_mode} serves one plan, not {len(wanted)}; use exit mode greedy"
        )
    device = torch.device(settings.device)
    if len(models) > 1 and device.type != "cpu":
        raise SettingsError(
            f"on {device.type} one model is served at a time, not {len(models)}; name depths of one model"
        )
    loaded, done, total = list[_LoadedModel](), 0, sum(max(depths) for _, depths in models)
    for entry, depths in models:
        loaded.append(
            _load_model(
                entry,
                {depth: one.threshold for depth, one in depths.items()},
                [entry.exit_layers[0]] if settings.probe_tokens else [],
                settings,
                None if progress is None else partial(_add_progress, progress, done, total),
                next((plan.model for plan in running if plan.entry.name == entry.name), None),
                beside_serving=bool(running) and not urgent,
            )
        )
        done += max(depths)
    first = loaded[0]
    for other in loaded[1:]:
        if other.tokenizer.tokenizer_id != first.tokenizer.tokenizer_id:
            raise InvalidRequestError(
                f"{other.entry.name} has another tokenizer than {first.entry.name}: one engine cannot serve "
                "both; start a worker for each"
            )
        if _kv_shape(other.model) != _kv_shape(first.model):
            raise SettingsError(
                f"{other.entry.name} and {first.entry.name} cannot be served together: their keys and values "
                "have different shapes; start a worker for each"
            )
    shares = [
        # On a GPU all blocks have as many layers as the deepest plan.
        {
            depth: one.share if device.type == "cpu" else float(depth == max(depths))
            for depth, one in depths.items()
        }
        for _, depths in models
    ]
    memory = plan_memory(
        [(one.entry.name, one.model, share) for one, share in zip(loaded, shares, strict=True)],
        first.entry.exit_layers,
        MemoryLimits(
            settings.memory_bytes or device_budget(device),
            settings.max_running,
            settings.step_token_budget,
            settings.block_tokens,
        ),
    )
    found = {
        id(one): Plan(
            entry=model.entry,
            served=ServedPlan(model=model.entry.name, depth=depth),
            model=model.model,
            runner=model.runner,
            tokenizer=model.tokenizer.tokenizer,
            tokenizer_id=model.tokenizer.tokenizer_id,
            tokenizer_json=model.tokenizer.tokenizer_json,
            chat_template=model.chat_template,
            memory=memory,
            thresholds=model.thresholds,
        )
        for model, (_, depths) in zip(loaded, models, strict=True)
        for depth, one in depths.items()
    }
    return tuple(found[id(one)] for one in wanted)


def bytes_read_for(plans: Sequence[Plan]) -> int:
    """Bytes read to load all models of the plans."""
    return sum({id(plan.model): plan.bytes_read for plan in plans}.values())


class _LoadedModel(NamedTuple):
    """What the plans of one model share."""

    entry: catalog.ModelEntry
    model: Model
    runner: Runner
    tokenizer: LoadedTokenizer
    chat_template: ChatTemplate | None
    thresholds: dict[int, float]


def _by_model(
    wanted: Sequence[PlanToLoad], context_tokens: int | None
) -> list[tuple[catalog.ModelEntry, dict[int, PlanToLoad]]]:
    """Each model, within this context, with its plans by depth. Raises InvalidRequestError."""
    entries: dict[str, catalog.ModelEntry] = {}
    plans: dict[str, dict[int, PlanToLoad]] = {}
    for one in wanted:
        entry = catalog.read_model(one.path).within(context_tokens)
        depth = one.depth or entry.num_layers
        if entries.setdefault(entry.name, entry).path != entry.path:
            raise InvalidRequestError(f"two models have the name {entry.name}; rename one of them")
        by_depth = plans.setdefault(entry.name, {})
        if depth in by_depth:
            raise InvalidRequestError(f"{entry.name} at depth {depth} is named twice; name each plan once")
        if not 0 < one.share < math.inf:
            raise InvalidRequestError(f"the share of a plan must be above 0, not {one.share}")
        by_depth[depth] = one
    return [(entries[name], by_depth) for name, by_depth in plans.items()]


def _load_model(
    entry: catalog.ModelEntry,
    own_thresholds: Mapping[int, float | None],
    probed_exits: Sequence[int],
    settings: EngineSettings,
    progress: Progress | None,
    running: Model | None,
    *,
    beside_serving: bool,
) -> _LoadedModel:
    """Loads a model to the deepest of its plans, with the heads of their exits and of those that are probed.

    own_thresholds: for each plan's depth, the threshold that overrides others.
    """
    depth = max(own_thresholds)
    if settings.exit_mode is ExitMode.FULL and depth != entry.num_layers:
        raise SettingsError(
            f"exit mode full serves all {entry.num_layers} layers of {entry.name}, not {depth}; "
            "use exit mode greedy for fewer"
        )
    is_dynamic = settings.exit_mode is ExitMode.DYNAMIC
    exits = sorted({*own_thresholds, *probed_exits})
    if is_dynamic:
        exits = [layer for layer in entry.exit_layers if layer <= depth]
    device = torch.device(settings.device)
    precision = precision_on(Precision(settings.precision), device)
    weights = load_packed(
        entry,
        depth,
        exits,
        precision,
        device,
        cache_dir=settings.packed_cache_dir,
        cache_bytes=settings.packed_cache_bytes,
        running=None if running is None else running.weights,
        beside_serving=beside_serving,
        progress=progress,
    )
    model = Model(entry.config, weights, settings.block_tokens)
    for one in own_thresholds:
        if not math.isfinite(warm_up(model, one).confidences[0]):
            raise _not_finite(entry.name, one, precision)

    def threshold_at(layer: int) -> float:
        own = own_thresholds[depth if is_dynamic else layer]
        calibrated = entry.facts.thresholds.get(layer, DEFAULT_THRESHOLD)
        return next(one for one in (own, settings.threshold, calibrated) if one is not None)

    served_exits = exits if is_dynamic else own_thresholds
    thresholds = {layer: threshold_at(layer) for layer in served_exits if layer < entry.num_layers}
    runner = choose_runner(
        model,
        thresholds if is_dynamic else None,
        cuda_graphs=settings.cuda_graphs,
        most_rows=settings.max_running,
    )
    tokenizer, chat_template = load_tokenizer(entry.path, entry.facts), read_chat_template(entry.path)
    return _LoadedModel(entry, model, runner, tokenizer, chat_template, thresholds)


def _add_progress(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    """Reports the layers of one model after those of the models before it."""
    progress(before + done, total)


def _kv_shape(model: Model) -> tuple[int, int, torch.dtype]:
    return model.config.num_kv_heads, model.config.head_dim, model.kv_dtype


@torch.inference_mode()
def warm_up(model: Model, depth: int | None = None) -> Sampled:
    """Computes and samples one token at a depth (None: all layers).

    So no request waits for set-up work at first use. Returns the sampled token.
    """
    cache = KVCache.of(model.config, model.depth, 1, model.block_tokens, model.kv_dtype, model.device)
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    batch = Batch.of(zero, zero, zero, zero[None], zero, 1, model.block_tokens, (), zero)
    # After a probe, prefill goes on with the layers alone.
    model.layers(0, 1, model.embed(zero, zero), batch, cache)
    found = model.backend.step(batch, cache, depth or model.depth, ONE_STEP)
    return sample(found, {0: Row(SamplingParams(temperature=1.0), 1, [0])})
