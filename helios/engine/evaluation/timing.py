"""Time and cost of a candidate at every exit: timed at some exits, fitted for all."""

import math
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import helios
from helios.catalog import ModelEntry
from helios.engine.backends.kv_cache import KVCache
from helios.engine.evaluation.candidate import Candidate
from helios.engine.evaluation.energy import measured_power
from helios.engine.evaluation.pace import Pace
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.evaluation.space import TIMED_PROMPTS, Space
from helios.engine.evaluation.speed import Clock, Speed, fit_speeds, measure_speed, timed_depths
from helios.engine.threads import get_threads, set_threads
from helios.hardware import cpu_name
from helios.history import ModelProfile

# Names in a profile's provenance: what speeds depend on, and how they were measured.
_STEP_FACTS = ("hardware", "device", "precision", "threads", "checkpoint", "helios", "torch")
_TIMING_FACTS = ("timed_at", "clock", "power")


@dataclass(frozen=True, slots=True)
class Timing:
    """Timings by depth: speeds, joules per token at the largest timed batch, seconds of a load."""

    speeds: Mapping[int, Speed]
    joules: Mapping[int, float | None]
    load_seconds: Mapping[int, float]
    # How the figures were measured.
    provenance: Mapping[str, str]

    @classmethod
    def of(cls, profile: ModelProfile) -> "Timing":
        """The timings of an earlier profile."""
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


def facts_of(candidate: Candidate, settings: EvaluationSettings) -> dict[str, str]:
    """Provenance of a profile: where, and in what form, the candidate is evaluated."""
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


def has_same_steps(
    timed: ModelProfile, entry: ModelEntry, settings: EvaluationSettings, facts: Mapping[str, str]
) -> bool:
    """Whether an earlier profile timed the same steps. facts: `facts_of` the candidate."""
    return (
        tuple(one.depth for one in timed.exits) == entry.exit_layers
        and all(tuple(speed.batch for speed in one.decode) == settings.batches for one in timed.exits)
        and all(timed.provenance.get(name) == facts[name] for name in _STEP_FACTS)
        and all(name in timed.provenance for name in _TIMING_FACTS)
    )


def time_steps(
    candidate: Candidate, cache: KVCache, space: Space, settings: EvaluationSettings, pace: Pace
) -> Timing:
    """Times steps at some exits, and fits the speeds of all. Raises CancelledError once `pace` is stopped."""
    model, exit_layers = candidate.model, candidate.entry.exit_layers
    # The choice of tokens makes no difference to the time.
    context = [index % candidate.entry.vocab_size for index in range(space.timed_context)]
    decoding = space.sequences(candidate.tokenizer, [context] * settings.batches[-1])
    for sequence in decoding:
        sequence.prompt_tokens = sequence.computed = len(context) - 1
    prompts = space.sequences(candidate.tokenizer, [context] * TIMED_PROMPTS)
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

    threads = get_threads()
    with measured_power(settings.device, settings.power_watts) as power:
        set_threads(settings.timing_threads or threads, settings.precision, settings.device)
        try:
            clock = Clock.of(model.device).name
            timed = {depth: measure(depth) for depth in depths}
        finally:
            set_threads(threads, settings.precision, settings.device)
    speeds = fit_speeds(timed, exit_layers)
    batch = settings.batches[-1]
    joules = {
        depth: None if power.watts is None else power.watts * speed.decode[batch] / batch
        for depth, speed in speeds.items()
    }
    # A load's time is proportional to the bytes that it reads.
    seconds_per_byte = candidate.load_seconds / candidate.weight_bytes[model.depth]
    load_seconds = {depth: size * seconds_per_byte for depth, size in candidate.weight_bytes.items()}
    facts = (str(time.time()), clock, power.source)
    return Timing(speeds, joules, load_seconds, dict(zip(_TIMING_FACTS, facts, strict=True)))
