"""How fast a model runs at a depth: the engine's own steps, timed."""

import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from helios.engine.batch import build_batch
from helios.engine.kv_cache import KVCache
from helios.engine.model import Model
from helios.engine.pace import Pace
from helios.engine.sampler import sample
from helios.engine.sequence import Sequence
from helios.engine.threads import get_threads


@dataclass(frozen=True, slots=True)
class Clock:
    """What steps are timed with. A step of one CPU thread is timed by what that thread computed, so that
    the load of others, whom the profiler lets go first, does not count."""

    name: str
    read: Callable[[], float]
    # One figure from several: on a clock that others' load adds to, the least disturbed one.
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

    # Of a decode step, by batch size.
    decode: dict[int, float]
    # Per token of prompts in one batch.
    prefill_per_token: float

    def first_token(self, prompt_tokens: int) -> float:
        """Seconds of the prefill of one prompt: a step, which any number of tokens takes, and the others."""
        return self.decode[min(self.decode)] + (prompt_tokens - 1) * self.prefill_per_token

    def toward(self, other: "Speed", share: float) -> "Speed":
        """A speed `share` of the way to another: layers cost the same, so depth is linear."""

        def between(low: float, high: float) -> float:
            return low + (high - low) * share

        return Speed(
            {batch: between(seconds, other.decode[batch]) for batch, seconds in self.decode.items()},
            between(self.prefill_per_token, other.prefill_per_token),
        )


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
    """From `repetitions` steps of each kind after one that warms up, as the clock chooses.

    decoding: sequences with blocks of their own and one token to compute, as many as the largest batch;
    prompts: sequences with blocks, nothing computed.
    """
    clock = Clock.of(model.device)

    def seconds(sequences: Seq[Sequence]) -> float:
        taken = []
        for _ in range(repetitions + 1):
            began = clock.read()
            _step(model, cache, depth, sequences, block_tokens)
            taken.append(clock.read() - began)
        # Not in between: a rest would let the caches go cold.
        pace.rest()
        return clock.choose(taken[1:])

    decode = {batch: seconds(decoding[:batch]) for batch in batches}
    return Speed(decode, seconds(prompts) / sum(prompt.pending for prompt in prompts))


def _step(model: Model, cache: KVCache, depth: int, sequences: Seq[Sequence], block_tokens: int) -> None:
    """An engine's step without its scheduling and detokenizing."""
    scheduled = [(sequence, sequence.pending) for sequence in sequences]
    batch, _ = build_batch(scheduled, block_tokens, model.device)
    sample(model.step(batch, cache, depth), {})
