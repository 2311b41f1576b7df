"""Measures how much long prompts slow the streams beside them, and what a shared prefix of prompts saves."""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.load.latency import Latency, latency
from bench.results import Report, Target
from bench.systems.random_model import random_model
from bench.systems.shapes import FIRST_TOKEN
from helios.engine import Engine, EngineSettings, Output, SamplingParams
from helios.engine.threads import set_threads

_SEED = 0
_CHAT_PROMPT_TOKENS = 32
_PREFIX_TOKENS, _SUFFIX_TOKENS = 1024, 32
_STRETCH_TARGET = 3.0
_PREFIX_TARGET = 5.0
# Rows of the first table.
_ALONE, _BOUNDED, _UNBOUNDED = "chats alone", "beside long prompts", "the same, chunks of the whole step"


def measure(
    shape: str,
    *,
    chats: int,
    chat_tokens: int,
    prompt_tokens: int,
    rounds: int,
    threads: int,
    precision: str,
    cache_dir: Path,
    say: Callable[[str], None],
) -> Report:
    """Runs `chats` streams of `chat_tokens` each: alone, beside long prompts, and beside unbounded chunks.

    Then it runs prompts with a shared prefix. `shape` names a model shape, which gets random weights.
    """
    set_threads(threads, precision)
    model = random_model(shape, cache_dir / "bench-models")
    settings = EngineSettings(precision=precision, max_running=chats + 1)
    engine = Engine.load(model, settings=settings)
    unbounded = Engine(engine.plan, replace(engine.settings, prefill_stretch=float("inf")))
    draw = random.Random(_SEED)
    vocabulary = range(FIRST_TOKEN, engine.plan.model.config.vocab_size)
    prompts = (draw.choices(vocabulary, k=prompt_tokens) for _ in itertools.count())
    gaps: dict[str, list[Latency]] = {_ALONE: [], _BOUNDED: [], _UNBOUNDED: []}
    ttft: dict[str, list[float]] = {_BOUNDED: [], _UNBOUNDED: []}
    for number in range(rounds):
        say(f"long prompts beside {chats} streams, round {number + 1}")
        chat_prompts = [draw.choices(vocabulary, k=_CHAT_PROMPT_TOKENS) for _ in range(chats)]
        for name, one, beside in (
            (_ALONE, engine, iter(())),
            (_BOUNDED, engine, prompts),
            (_UNBOUNDED, unbounded, prompts),
        ):
            between, first = _chat(one, chat_prompts, chat_tokens, beside)
            gaps[name].append(latency(between))
            if first:
                ttft[name].append(statistics.median(first))
    say("a shared beginning")
    shared = [_shared_beginning(engine, partial(draw.choices, vocabulary)) for _ in range(rounds)]
    return _report(engine, gaps, ttft, shared)


def _chat(
    engine: Engine, chats: Sequence[list[int]], tokens: int, prompts: Iterator[list[int]]
) -> tuple[list[float], list[float]]:
    """Runs streams to their end while long prompts come one after the other.

    Returns the seconds between the tokens of each stream, and the seconds to each long prompt's first token.
    """
    arrivals: list[list[float]] = [[] for _ in chats]
    first: list[float] = []
    done: list[int] = []

    def take(index: int, output: Output) -> None:
        if output.error is not None:
            raise output.error
        arrivals[index] += [time.perf_counter()] * len(output.tokens)
        if output.finish is not None:
            done.append(index)

    for index, chat in enumerate(chats):
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        engine.submit(f"chat-{index}", chat, sampling, partial(take, index))
    while not all(arrivals):
        engine.step()
    number, began, ended = 0, 0.0, True

    def take_long(output: Output) -> None:
        nonlocal ended
        ended = True
        if output.tokens:
            first.append(time.perf_counter() - began)

    while len(done) < len(chats):
        if ended and (prompt := next(prompts, None)) is not None:
            number, began, ended = number + 1, time.perf_counter(), False
            engine.submit(f"long-{number}", prompt, SamplingParams(max_tokens=1), take_long)
        engine.step()
    engine.cancel(f"long-{number}")
    while engine.step():
        pass
    return [later - sooner for times in arrivals for sooner, later in itertools.pairwise(times)], first


def _shared_beginning(engine: Engine, draw: Callable[..., list[int]]) -> tuple[float, float]:
    """Seconds to the first token: of a prompt, and of another prompt with the same prefix."""
    beginning = draw(k=_PREFIX_TOKENS)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        next(iter(engine.generate([*beginning, *draw(k=_SUFFIX_TOKENS)], SamplingParams(max_tokens=1))))
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


def _report(
    engine: Engine,
    gaps: dict[str, list[Latency]],
    ttft: dict[str, list[float]],
    shared: Sequence[tuple[float, float]],
) -> Report:
    def stretch(name: str) -> float:
        pairs = zip(gaps[name], gaps[_ALONE], strict=True)
        return statistics.median(one.p99 / alone.p99 for one, alone in pairs)

    bounded, unbounded = stretch(_BOUNDED), stretch(_UNBOUNDED)
    saved = statistics.median(first / second for first, second in shared)
    results: dict[str, Any] = {
        "model": engine.plan.entry.name,
        "precision": engine.plan.model.precision,
        "prefill_stretch": engine.settings.prefill_stretch,
        "step_token_budget": engine.settings.step_token_budget,
        "time_between_tokens_ms": {name: [asdict(one) for one in found] for name, found in gaps.items()},
        "p99_against_chats_alone": {_BOUNDED: bounded, _UNBOUNDED: unbounded},
        "long_prompt_ttft_seconds": ttft,
        "shared_beginning": {
            "tokens": [_PREFIX_TOKENS, _SUFFIX_TOKENS],
            "ttft_seconds": [list(pair) for pair in shared],
            "ratio": saved,
        },
    }
    rows = []
    for name, found in gaps.items():
        p50, p99 = (statistics.median(getattr(one, part) for one in found) for part in ("p50", "p99"))
        words = f"P50 {p50:.1f} ms, P99 {p99:.1f} ms"
        if ttft.get(name):
            words += f"; TTFT of a long prompt {statistics.median(ttft[name]) * 1000:,.0f} ms"
        rows.append((f"time between tokens, {name}", words))
    first, second = (statistics.median(times) for times in zip(*shared, strict=True))
    rows.append(
        (
            f"TTFT, {_PREFIX_TOKENS} + {_SUFFIX_TOKENS} tokens",
            f"{first * 1000:.0f} ms; with the same beginning again {second * 1000:.0f} ms",
        )
    )
    targets = [
        Target(
            "P99 of the time between tokens beside long prompts, against chats alone",
            f"at most {_STRETCH_TARGET:g}x",
            f"{bounded:.2f}x (without a bound {unbounded:.2f}x)",
            bounded <= _STRETCH_TARGET,
        ),
        Target(
            "TTFT of a prompt, against one whose beginning is known",
            f"at least {_PREFIX_TARGET:g}x",
            f"{saved:.1f}x",
            saved >= _PREFIX_TARGET,
        ),
    ]
    return Report(results, targets, rows)
