"""Measures how fast a model runs at one depth, by timing the engine's own steps."""

import statistics
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import combinations

import torch

from helios.engine.backends.burst import ONE_STEP
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.backends.readout import read, read_on_device
from helios.engine.backends.sampler import sample
from helios.engine.evaluation.pace import Pace
from helios.engine.scheduling.batch import build_batch
from helios.engine.scheduling.sequence import Sequence
from helios.engine.threads import get_threads

# With at least five depths, one bad timing cannot move a Theil-Sen slope outside the range of the others.
_TIMED_DEPTHS = 5
# Steps are repeated until they took this many seconds in total. Cold caches distort short steps most.
_LEAST_TIMED_SECONDS = 2e-3
# A layer takes at least this share of the median step, so that noise never makes a layer free.
_LEAST_LAYER_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock that times steps.

    A step of one CPU thread is timed by the CPU time of that thread. So the load of other processes, which
    the profiler lets go first, does not count.
    """

    name: str
    read: Callable[[], float]
    # Picks one figure from several. On a clock that includes others' load, this is the least disturbed
    # figure.
    choose: Callable[[Seq[float]], float] = min

    @classmethod
    def of(cls, device: torch.device) -> "Clock":
        """The clock for steps on `device` with the threads that torch has now."""
        if device.type == "cuda":

            def synchronized() -> float:
                torch.cuda.synchronize(device)
                return time.perf_counter()

            return cls("wall, synchronized", synchronized)
        if get_threads() == 1:
            return cls("cpu time of the thread", time.thread_time, statistics.median)
        return cls("wall", time.perf_counter)


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of a model's steps at one depth."""

    # Seconds of a decode step, by batch size.
    decode: dict[int, float]
    # Seconds per token, for prompts in one batch.
    prefill_per_token: float

    def first_token(self, prompt_tokens: int) -> float:
        """Seconds of one prompt's prefill: one decode step, plus the prefill time of each further token."""
        return self.decode[min(self.decode)] + (prompt_tokens - 1) * self.prefill_per_token


def timed_depths(depths: Seq[int]) -> list[int]:
    """Chooses which of these ascending depths to time: the first, the last, and up to three in between."""
    gap = (depths[-1] - depths[0]) / (_TIMED_DEPTHS - 1)
    targets = [depths[0] + index * gap for index in range(_TIMED_DEPTHS)]
    return sorted({min(depths, key=lambda depth: abs(depth - target)) for target in targets})


def fit_speeds(timed: Mapping[int, Speed], depths: Seq[int]) -> dict[int, Speed]:
    """The speed at each of these ascending depths, fitted to timings at some of them.

    All layers of a model are alike, so seconds are linear in the depth. Whatever was timed, fitted seconds
    grow with the depth and do not fall with the batch size.
    """
    first, last = depths[0], depths[-1]
    batches = sorted(next(iter(timed.values())).decode)
    lines = [_fit_line({depth: speed.decode[batch] for depth, speed in timed.items()}) for batch in batches]
    prefill = _fit_line({depth: speed.prefill_per_token for depth, speed in timed.items()})
    # Isotonic regression keeps inequalities between its inputs, so the last depth stays above the first.
    low = _isotonic([fixed + first * per_layer for fixed, per_layer in lines])
    high = _isotonic([fixed + last * per_layer for fixed, per_layer in lines])

    def decode(depth: int) -> dict[int, float]:
        share = (depth - first) / max(last - first, 1)
        ends = zip(batches, low, high, strict=True)
        return {batch: (1 - share) * shallow + share * deep for batch, shallow, deep in ends}

    return {depth: Speed(decode(depth), prefill[0] + depth * prefill[1]) for depth in depths}


def _fit_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Fits seconds by depth: fixed seconds, at least 0, and seconds per layer, above 0.

    The slope is the Theil-Sen estimator, the median slope of all pairs (doi:10.1080/01621459.1968.10480934).
    """
    slopes = [
        (seconds[deep] - seconds[shallow]) / (deep - shallow)
        for shallow, deep in combinations(sorted(seconds), 2)
    ]
    if slopes:
        least = _LEAST_LAYER_SHARE * statistics.median(seconds.values())
        per_layer = max(statistics.median(slopes), least)
        fixed = statistics.median(taken - depth * per_layer for depth, taken in seconds.items())
        if fixed >= 0:
            return fixed, per_layer
    # One depth cannot separate the two parts, and a negative fixed part is noise.
    return 0.0, statistics.median(taken / depth for depth, taken in seconds.items())


def _isotonic(values: Seq[float]) -> list[float]:
    """The nearest sequence (least squares) that does not fall: isotonic regression by its max-min formula."""
    count = len(values)
    return [
        max(
            min(statistics.fmean(values[start : end + 1]) for end in range(index, count))
            for start in range(index + 1)
        )
        for index in range(count)
    ]


@torch.inference_mode()
def measure_speed(
    model: Model,
    cache: KVCache,
    depth: int,
    decoding: Seq[Sequence],
    prompts: Seq[Sequence],
    batches: Seq[int],
    repetitions: int,
    block_tokens: int,
    pace: Pace,
) -> Speed:
    """Times at least `repetitions` steps of each kind after one warm-up step. The clock picks one figure.

    decoding: sequences with their own blocks and one token to compute, as many as the largest batch. prompts:
    sequences with blocks, nothing computed. Raises CancelledError once `pace` is stopped.
    """
    clock = Clock.of(model.device)

    def seconds(sequences: Seq[Sequence]) -> float:
        taken: list[float] = []
        while len(taken) <= repetitions or sum(taken[1:]) < _LEAST_TIMED_SECONDS:
            began = clock.read()
            _step(model, cache, depth, sequences, block_tokens)
            taken.append(clock.read() - began)
        # Not between steps, because a rest would let the CPU caches go cold.
        pace.rest()
        return clock.choose(taken[1:])

    decode = {batch: seconds(decoding[:batch]) for batch in batches}
    return Speed(decode, seconds(prompts) / sum(prompt.pending for prompt in prompts))


@torch.inference_mode()
def measure_reading(model: Model, exit_layer: int, rows: int, repetitions: int) -> float:
    """Seconds of a row of the LM head and its summary, when `rows` are read out at once after an exit."""
    clock = Clock.of(model.device)
    # The values make no difference to the time.
    hidden = torch.ones(rows, model.config.hidden_size, device=model.device)
    summarized = read if model.device.type == "cpu" else read_on_device
    taken = []
    for _ in range(1 + repetitions):
        began = clock.read()
        summarized(model.read_out(hidden, exit_layer))
        taken.append(clock.read() - began)
    return clock.choose(taken[1:]) / rows


def _step(model: Model, cache: KVCache, depth: int, sequences: Seq[Sequence], block_tokens: int) -> None:
    """A step of the engine without scheduling and detokenizing."""
    scheduled = [(sequence, sequence.pending) for sequence in sequences]
    batch, _ = build_batch(scheduled, block_tokens, model.device)
    sample(model.backend.step(batch, cache, depth, ONE_STEP), {})
