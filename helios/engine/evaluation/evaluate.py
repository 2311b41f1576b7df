"""Evaluates a candidate on given prompts (arXiv 2504.10724): quality, speed, size of each exit."""

import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

import helios
from helios.calibration import TARGET_AGREEMENT, calibrated_threshold
from helios.catalog import ModelEntry
from helios.engine.backends.kv_cache import KVCache, kv_bytes, kv_dtype
from helios.engine.backends.model import Model
from helios.engine.evaluation.pace import Pace
from helios.engine.evaluation.tally import ExitTally, tally_continuations, tally_prompt
from helios.engine.evaluation.timing import Clock, Speed, fit_speeds, measure_speed, timed_depths
from helios.engine.memory import device_budget
from helios.engine.plan import warm_up
from helios.engine.scheduling.block_pool import BlockPool
from helios.engine.scheduling.detokenizer import Detokenizer
from helios.engine.scheduling.sequence import Sequence
from helios.engine.threads import get_threads, set_threads
from helios.engine.tokenizer import load_tokenizer
from helios.engine.weights.loader import load_packed
from helios.engine.weights.packed_cache import DEFAULT_LIMIT_BYTES
from helios.engine.weights.precision import Precision
from helios.errors import CheckpointError, InvalidRequestError, SettingsError
from helios.hardware import cpu_name
from helios.history import CONFIDENCE_BINS, DecodeSpeed, ExitProfile, ModelProfile, RequestSample
from helios.power_meter import power_meter
from helios.sampling import SamplingParams
from helios.served import ServedPlan

Progress = Callable[[int, int], None]  # requests done, requests in all

# Requests that are continued in one batch.
_GROUP = 8
# What steps are timed over, whatever the traffic: context of a decode, and prompts of a prefill.
_TIMED_CONTEXT = 128
_TIMED_PROMPTS = 2


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How candidates are evaluated. Tokens and sequences are counts, memory is bytes, power is watts."""

    target_agreement: float = TARGET_AGREEMENT
    # One confidence for every exit; None: calibrated on the prompts.
    threshold: float | None = None
    # Longer prompts are cut to their first tokens.
    max_prompt_tokens: int = 256
    generated_tokens: int = 32
    batches: tuple[int, ...] = (1, 8, 32)
    # Timed steps of each kind, shared out among the exits that are timed; short steps are timed more often.
    repetitions: int = 5
    device: str = "cpu"
    precision: str = "float32"
    # For weights and KV. None: a share of what the device has free.
    memory_bytes: int | None = None
    # Drawn while decoding, for machines without a readable meter. None: energy is unknown there.
    power_watts: float | None = None
    # With which steps are timed. None: those of the evaluation.
    timing_threads: int | None = None
    block_tokens: int = 16
    # Where packed weights are kept, as in EngineSettings.
    packed_cache_dir: Path | None = None
    packed_cache_bytes: int = DEFAULT_LIMIT_BYTES

    def __post_init__(self) -> None:
        """Raises SettingsError naming the setting that is out of range."""
        for name in ("max_prompt_tokens", "generated_tokens", "repetitions", "block_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1")
        if not self.batches or self.batches[0] < 1 or list(self.batches) != sorted(set(self.batches)):
            raise SettingsError(f"batches must ascend from at least 1, not {self.batches}")
        if self.precision not in list(Precision):
            raise SettingsError(f"precision {self.precision} is unknown; use one of {', '.join(Precision)}")

    @property
    def budget(self) -> int:
        """Bytes that an evaluation may take now."""
        return self.memory_bytes or device_budget(torch.device(self.device))

    @property
    def precision_here(self) -> Precision:
        """What is computed in on the device. Raises SettingsError when it cannot."""
        return Precision(self.precision).on(torch.device(self.device))

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values."""
        return kv_dtype(self.precision_here, torch.device(self.device))

    @property
    def weight_item_bytes(self) -> int:
        """Bytes of a weight as it is loaded, at most: int8 keeps embeddings in float16."""
        precision = self.precision_here
        return 2 if precision is Precision.INT8 else precision.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model loaded whole, with every exit: evaluated again and again while it is kept."""

    entry: ModelEntry
    model: Model
    tokenizer: Tokenizer
    tokenizer_id: str
    # Of a model loaded to each exit layer.
    weight_bytes: Mapping[int, int]
    # What loading took, in seconds of wall clock and of CPU.
    load_seconds: float
    load_cpu_seconds: float
    # Changes with the files that it was loaded from.
    checkpoint: str


def load_candidate(entry: ModelEntry, settings: EvaluationSettings) -> Candidate:
    """Raises CheckpointError naming the file, OutOfMemoryError."""
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
    # Without the warm-up, which compiles kernels on a machine that has none yet: no later load does.
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


def needed_bytes(entry: ModelEntry, prompts: Seq[Seq[int]], settings: EvaluationSettings) -> int:
    """Bytes that evaluating a model takes, its weights included, its steps' timing too."""
    config = entry.config
    block = kv_bytes(config.num_heads, config.head_dim, settings.block_tokens, settings.kv_dtype)
    blocks = _Space.plan(entry, [_fitted(prompt, entry, settings) for prompt in prompts], settings).num_blocks
    return entry.parameters * settings.weight_item_bytes + blocks * entry.num_layers * block


def evaluate(
    candidate: Candidate,
    prompts: Seq[Seq[int]],
    settings: EvaluationSettings,
    progress: Progress | None = None,
    pace: Pace | None = None,
    timed: ModelProfile | None = None,
    names: Seq[str] | None = None,
) -> ModelProfile:
    """Runs prompts (ids of the model's tokens) at full depth, reading every exit, then times its steps.

    Histograms count every position of the prompts and of their greedy continuations by the last layer, since
    served text is generated text; perplexity is of the prompts alone. Works in the caller's thread.

    timed: an earlier profile of the model, whose speeds are taken over when it comes from equal hardware,
    threads, precision and checkpoint: unlike quality they do not follow the traffic, and measuring them is
    most of the work. names: of the prompts, the same for every candidate; default: by their ids.

    Raises InvalidRequestError for prompts that cannot be run, CheckpointError for weights that compute no
    probabilities, CancelledError once `pace` is stopped.
    """
    pace = pace or Pace()
    began, began_cpu = time.perf_counter(), time.process_time()
    entry, model, tokenizer = candidate.entry, candidate.model, candidate.tokenizer
    ids = [_fitted(prompt, entry, settings) for prompt in prompts]
    predicted = sum(len(one) - 1 for one in ids)
    text_bytes = [len(tokenizer.decode(one[1:]).encode()) for one in ids]
    if not sum(text_bytes):
        raise InvalidRequestError("the prompts hold no text after their first tokens")
    facts = _facts(candidate, settings)
    if timed is not None and not _same_steps(timed, entry, settings, facts):
        timed = None
    space = _Space.plan(entry, ids, settings, timing=timed is None)
    cache = space.cache(model)

    tallies = {layer: ExitTally() for layer in entry.exit_layers}
    block_tokens, steps = settings.block_tokens, settings.generated_tokens - 1
    samples: list[RequestSample] = []
    for first in range(0, len(ids), _GROUP):
        group = space.sequences(tokenizer, ids[first : first + _GROUP], settings.generated_tokens)
        for done, sequence in enumerate(group, first):
            if progress is not None:
                progress(done, len(ids))
            before = [tally.nats for tally in tallies.values()]
            tally_prompt(model, cache, sequence, block_tokens, tallies, pace)
            nats = [tally.nats - so_far for tally, so_far in zip(tallies.values(), before, strict=True)]
            name = str(hash(tuple(ids[done]))) if names is None else names[done]
            samples.append(RequestSample(id=name, text_bytes=text_bytes[done], nats=tuple(nats)))
        tally_continuations(model, cache, group, steps, block_tokens, tallies, pace)
    if progress is not None:
        progress(len(ids), len(ids))
    if not all(math.isfinite(tally.nats) for tally in tallies.values()):
        raise CheckpointError(
            f"{entry.path} computes no finite probabilities as {settings.precision}; fetch it again"
        )
    began_timing = time.process_time()
    timing = _Timing.of(timed) if timed is not None else _time_steps(candidate, cache, space, settings, pace)
    once_cpu_seconds = time.process_time() - began_timing

    median_prompt = statistics.median_low(map(len, ids))
    block_bytes = kv_bytes(cache.num_heads, cache.head_dim, block_tokens, cache.dtype)

    def profile(depth: int) -> ExitProfile:
        tally, speed = tallies[depth], timing.speeds[depth]
        return ExitProfile(
            depth=depth,
            threshold=_threshold(tally, settings) if depth < model.depth else 0.0,
            confidence_counts=tuple(tally.counts.tolist()),
            agreement_counts=tuple(tally.agreements.tolist()),
            perplexity=math.exp(tally.nats / predicted),
            nats_per_byte=tally.nats / sum(text_bytes),
            decode=tuple(
                DecodeSpeed(batch=batch, step_seconds=seconds) for batch, seconds in speed.decode.items()
            ),
            prefill_tokens_per_second=1 / speed.prefill_per_token,
            ttft_seconds=speed.first_token(median_prompt),
            weight_bytes=candidate.weight_bytes[depth],
            kv_bytes_per_token=depth * block_bytes // block_tokens,
            load_seconds=timing.load_seconds[depth],
            joules_per_token=timing.joules[depth],
        )

    return ModelProfile(
        model=entry.name,
        time=time.time(),
        requests=len(ids),
        tokens=int(tallies[model.depth].counts.sum()),
        exits=tuple(profile(depth) for depth in entry.exit_layers),
        wall_seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - began_cpu,
        once_cpu_seconds=once_cpu_seconds,
        tokenizer_id=candidate.tokenizer_id,
        bytes_per_token=sum(text_bytes) / predicted,
        samples=tuple(samples),
        provenance={
            **facts,
            **timing.provenance,
            "thresholds": (
                f"agreement {settings.target_agreement:g}" if settings.threshold is None else "fixed"
            ),
        },
    )


@dataclass(frozen=True, slots=True)
class _Space:
    """The KV that an evaluation needs."""

    num_blocks: int
    block_tokens: int
    timed_context: int
    # The model whole.
    served: ServedPlan

    @classmethod
    def plan(
        cls, entry: ModelEntry, ids: Seq[Seq[int]], settings: EvaluationSettings, *, timing: bool = True
    ) -> "_Space":
        """What these prompts need, and with `timing` the steps that are timed."""
        timed_context = min(_TIMED_CONTEXT, entry.context_tokens)
        pool = BlockPool(0, settings.block_tokens)
        longest = max(map(len, ids)) + settings.generated_tokens
        num_blocks = min(len(ids), _GROUP) * pool.blocks_for(longest)
        if timing:
            sequences = max(settings.batches[-1], _TIMED_PROMPTS)
            num_blocks = max(num_blocks, sequences * pool.blocks_for(timed_context))
        served = ServedPlan(model=entry.name, depth=entry.num_layers)
        return cls(num_blocks, settings.block_tokens, timed_context, served)

    def cache(self, model: Model) -> KVCache:
        """The KV of all layers."""
        return KVCache.of(
            model.config, model.depth, self.num_blocks, self.block_tokens, model.kv_dtype, model.device
        )

    def sequences(self, tokenizer: Tokenizer, ids: Seq[Seq[int]], room: int = 0) -> list[Sequence]:
        """Sequences of these tokens with blocks for them and `room` more; they own the whole cache."""
        pool = BlockPool(self.num_blocks, self.block_tokens)
        return [
            Sequence(
                request_id="",
                token_ids=list(one),
                prompt_tokens=len(one),
                sampling=SamplingParams(),
                detokenizer=Detokenizer(tokenizer, ()),
                sink=lambda _: None,
                plan=self.served,
                blocks=pool.allocate(pool.blocks_for(len(one) + room)),
            )
            for one in ids
        ]


# What speeds hang on, and how they were measured.
_STEP_FACTS = ("hardware", "device", "precision", "threads", "checkpoint", "helios", "torch")
_TIMING_FACTS = ("timed_at", "clock", "power")


def _facts(candidate: Candidate, settings: EvaluationSettings) -> dict[str, str]:
    device = candidate.model.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "host": socket.gethostname(),
        "hardware": hardware,
        "device": settings.device,
        "precision": settings.precision_here.value,
        "threads": str(settings.timing_threads or get_threads()),
        "checkpoint": candidate.checkpoint,
        "helios": helios.__version__,
        "torch": torch.__version__,
    }


@dataclass(frozen=True, slots=True)
class _Timing:
    """Speeds, joules per token at the largest timed batch, and seconds of a load, by depth; and how they
    were measured."""

    speeds: Mapping[int, Speed]
    joules: Mapping[int, float | None]
    load_seconds: Mapping[int, float]
    provenance: Mapping[str, str]

    @classmethod
    def of(cls, profile: ModelProfile) -> "_Timing":
        """What an earlier profile measured."""
        exits = profile.exits
        speeds = {
            one.depth: Speed(
                {speed.batch: speed.step_seconds for speed in one.decode},
                1 / one.prefill_tokens_per_second,
            )
            for one in exits
        }
        return cls(
            speeds,
            {one.depth: one.joules_per_token for one in exits},
            {one.depth: one.load_seconds for one in exits},
            {name: profile.provenance[name] for name in _TIMING_FACTS},
        )


def _time_steps(
    candidate: Candidate, cache: KVCache, space: _Space, settings: EvaluationSettings, pace: Pace
) -> _Timing:
    """Times steps at some exits, and fits the speeds of all."""
    model, exit_layers = candidate.model, candidate.entry.exit_layers
    # Which tokens they are makes no difference to the time.
    context = [index % candidate.entry.vocab_size for index in range(space.timed_context)]
    decoding = space.sequences(candidate.tokenizer, [context] * settings.batches[-1])
    for sequence in decoding:
        sequence.prompt_tokens = sequence.computed = len(context) - 1
    prompts = space.sequences(candidate.tokenizer, [context] * _TIMED_PROMPTS)
    depths = timed_depths(exit_layers)
    repetitions = math.ceil(settings.repetitions / len(depths))

    def measure(depth: int) -> Speed:
        return measure_speed(
            model,
            cache,
            depth,
            decoding,
            prompts,
            settings.batches,
            repetitions,
            settings.block_tokens,
            pace,
        )

    meter = power_meter(settings.device)
    began, before = time.perf_counter(), meter.read() if meter is not None else ()
    threads = get_threads()
    set_threads(settings.timing_threads or threads, settings.precision, settings.device)
    try:
        clock = Clock.of(model.device).name
        timed = {depth: measure(depth) for depth in depths}
    finally:
        set_threads(threads, settings.precision, settings.device)
    watts, source = settings.power_watts, "unknown" if settings.power_watts is None else "configured"
    if meter is not None:
        watts, source = meter.joules_since(before) / (time.perf_counter() - began), meter.name
    speeds = fit_speeds(timed, exit_layers)
    batch = settings.batches[-1]
    joules = {
        depth: None if watts is None else watts * speed.decode[batch] / batch
        for depth, speed in speeds.items()
    }
    # Loading takes as long as there are bytes to read.
    seconds_per_byte = candidate.load_seconds / candidate.weight_bytes[model.depth]
    load_seconds = {depth: size * seconds_per_byte for depth, size in candidate.weight_bytes.items()}
    facts = (str(time.time()), clock, source)
    return _Timing(speeds, joules, load_seconds, dict(zip(_TIMING_FACTS, facts, strict=True)))


def _same_steps(
    timed: ModelProfile, entry: ModelEntry, settings: EvaluationSettings, facts: Mapping[str, str]
) -> bool:
    """Whether an earlier profile timed what would be timed now."""
    return (
        tuple(one.depth for one in timed.exits) == entry.exit_layers
        and all(tuple(speed.batch for speed in one.decode) == settings.batches for one in timed.exits)
        and all(timed.provenance.get(name) == facts[name] for name in _STEP_FACTS)
        and all(name in timed.provenance for name in _TIMING_FACTS)
    )


def _fitted(prompt: Seq[int], entry: ModelEntry, settings: EvaluationSettings) -> list[int]:
    """The prompt, cut so that its continuation fits the context."""
    outside = [token for token in prompt if not 0 <= token < entry.vocab_size]
    if not prompt or outside:
        problem = f"token {outside[0]}, which {entry.name} does not know" if outside else "no token"
        raise InvalidRequestError(f"a prompt to evaluate on holds {problem}; give ids of its tokenizer")
    room = entry.context_tokens - settings.generated_tokens
    if room < 1:
        raise InvalidRequestError(
            f"generated_tokens ({settings.generated_tokens}) must be below the context of {entry.name} "
            f"({entry.context_tokens})"
        )
    return list(prompt[: min(settings.max_prompt_tokens, room)])


def _threshold(tally: ExitTally, settings: EvaluationSettings) -> float:
    if settings.threshold is not None:
        return settings.threshold
    edges = [index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS)]
    return calibrated_threshold(
        edges, tally.counts.tolist(), tally.agreements.tolist(), settings.target_agreement
    )
