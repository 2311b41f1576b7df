"""Runs an engine under load in this process, without sockets and services."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench.load.latency import Latency, latency
from helios.engine import Engine, GeneratedToken, Output, SamplingParams
from helios.engine.kernels.team import TEAM
from helios.errors import HeliosError
from helios.power_meter import power_meter

_run_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of requests that were served to their end. Rates are tokens per second."""

    token_ids: tuple[tuple[int, ...], ...]
    exit_layers: tuple[int, ...]
    tokens: int
    seconds: float
    # Over the whole run, prefill included.
    tokens_per_second: float
    # Measured from the moment when all of the first requests have their first token.
    decode_tokens_per_second: float
    # Share of the decoding time that was spent in Python or torch, not in compiled code.
    overhead: float
    # Per second of this thread's CPU time, so other work on the machine does not count.
    tokens_per_cpu_second: float
    ttft_ms: Latency
    tpot_ms: Latency
    # None: there is no meter that can be read.
    joules_per_token: float | None


def run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    concurrency: int,
    between_steps: Callable[[], None] | None = None,
) -> Run:
    """Continues all prompts greedily, `concurrency` of them at a time.

    max_tokens: one number for all, or one for each. between_steps: called after each step.
    Raises the error of a request that failed.
    """
    lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    number = next(_run_numbers)
    opened = [0.0] * len(prompts)
    arrivals: list[list[float]] = [[] for _ in prompts]
    tokens: list[list[GeneratedToken]] = [[] for _ in prompts]
    ended: list[int] = []
    errors: list[HeliosError] = []
    pending = iter(range(len(prompts)))

    def take(index: int, output: Output) -> None:
        tokens[index] += output.tokens
        arrivals[index] += [time.perf_counter()] * len(output.tokens)
        if output.error is not None:
            errors.append(output.error)
        if output.error is not None or output.finish is not None:
            ended.append(index)

    def submit(index: int) -> None:
        opened[index] = time.perf_counter()
        sampling = SamplingParams(max_tokens=lengths[index], ignore_eos=True)
        engine.submit(f"{number}-{index}", list(prompts[index]), sampling, partial(take, index))

    # Services do the same when they are ready (`service_process.say_ready`).
    gc.collect()
    gc.freeze()
    meter = power_meter(engine.settings.device)
    before = meter.read() if meter is not None else ()
    began, began_cpu = time.perf_counter(), time.thread_time()
    for index in itertools.islice(pending, concurrency):
        submit(index)
    seen = 0
    # The time when each step ended, and the seconds spent in compiled code until then.
    steps: list[tuple[float, float]] = []
    while len(ended) < len(prompts):
        engine.step()
        steps.append((time.perf_counter(), TEAM.seconds))
        if errors:
            raise errors[0]
        while seen < len(ended):
            seen += 1
            for index in itertools.islice(pending, 1):
                submit(index)
        if between_steps is not None:
            between_steps()
    seconds, cpu = time.perf_counter() - began, time.thread_time() - began_cpu
    joules = None if meter is None else meter.joules_since(before)
    # Otherwise the objects of this engine would never be freed.
    gc.unfreeze()
    total = sum(map(len, tokens))
    warm = max(times[0] for times in arrivals[:concurrency])
    decoded = sum(moment > warm for times in arrivals for moment in times)
    decoding = [step for step in steps if step[0] > warm]
    (warm_end, compiled), (end, compiled_end) = decoding[0], decoding[-1]
    overhead = 1 - (compiled_end - compiled) / (end - warm_end) if end > warm_end else 0.0
    return Run(
        token_ids=tuple(tuple(token.token_id for token in one) for one in tokens),
        exit_layers=tuple(token.exit_layer for one in tokens for token in one),
        tokens=total,
        seconds=seconds,
        tokens_per_second=total / seconds,
        decode_tokens_per_second=decoded / (began + seconds - warm),
        overhead=overhead,
        tokens_per_cpu_second=total / cpu,
        ttft_ms=latency([times[0] - start for times, start in zip(arrivals, opened, strict=True)]),
        tpot_ms=latency([(t[-1] - t[0]) / (len(t) - 1) for t in arrivals if len(t) > 1]),
        joules_per_token=None if joules is None else joules / total,
    )


def alternate(measures: Mapping[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Runs the measures in turns, `rounds` times, so that other work on the machine slows all alike."""
    runs: dict[str, list[Run]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            runs[name].append(measure())
    return runs


def median_run(runs: Sequence[Run]) -> Run:
    """The run of median throughput."""
    return sorted(runs, key=lambda one: one.tokens_per_second)[len(runs) // 2]


def ratio(runs: Sequence[Run], base: Sequence[Run], figure: Callable[[Run], float]) -> float:
    """The median, over the rounds, of a figure divided by the base's figure of the same round."""
    return statistics.median(figure(one) / figure(other) for one, other in zip(runs, base, strict=True))
