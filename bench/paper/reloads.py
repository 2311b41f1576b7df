"""Reloads under load: lost and repeated tokens, stalls of streams, and tail latency."""

import bisect
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from bench.load import decode
from bench.load.latency import latency
from bench.results import Target
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.engine import Engine, EngineSettings, Output, SamplingParams
from helios.errors import HeliosError, UnavailableError

# Mean number of tokens of each stream between two reloads.
_TOKENS_BETWEEN = 2
_DEADLINE_SECONDS = 120.0


@dataclass(slots=True)
class _Stream:
    """Tokens of one request: their indices and arrival times. `opened` and `times` are in seconds."""

    expected: int
    opened: float = field(default_factory=time.perf_counter)
    indices: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class _Load:
    """Keeps a number of streams open on a running engine. When one ends, a new one begins."""

    def __init__(self, engine: Engine, prompts: Sequence[list[int]], max_tokens: int) -> None:
        self.streams: list[_Stream] = []
        self._engine = engine
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._progress = threading.Condition()
        self._tokens = 0
        self._open = 0
        self._closing = False
        self._error: HeliosError | None = None

    def open(self, count: int) -> None:
        """Opens `count` streams. The first ones are shorter, so that later streams are out of step."""
        for index in range(count):
            with self._progress:
                number = self._take_number(-(-self._max_tokens * (index + 1) // count))
            self._submit(number)

    def wait(self, tokens: int) -> None:
        """Returns after `tokens` more tokens. Raises the error of a stream that failed."""
        goal = self._tokens + tokens
        self._wait_until(lambda: self._tokens >= goal)

    def close(self) -> None:
        """Opens no more streams and waits until all have ended. Raises the error of a stream that failed."""
        with self._progress:
            self._closing = True
        self._wait_until(lambda: self._open == 0)

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        with self._progress:
            in_time = self._progress.wait_for(lambda: self._error or reached(), _DEADLINE_SECONDS)
        if self._error is not None:
            raise self._error
        if not in_time:
            raise UnavailableError(f"the engine made no progress within {_DEADLINE_SECONDS:g} s")

    def _take_number(self, expected: int) -> int:
        """The number of a new stream. The caller holds the lock."""
        self.streams.append(_Stream(expected))
        self._open += 1
        return len(self.streams) - 1

    def _submit(self, number: int) -> None:
        prompt, stream = list(self._prompts[number % len(self._prompts)]), self.streams[number]
        sampling = SamplingParams(max_tokens=stream.expected, ignore_eos=True)
        self._engine.submit(f"reload-{number}", prompt, sampling, partial(self._take, stream))

    def _take(self, stream: _Stream, output: Output) -> None:
        """Takes the outputs of a stream. Called on the engine's thread."""
        now = time.perf_counter()
        stream.indices += [token.index for token in output.tokens]
        stream.times += [now] * len(output.tokens)
        ended = output.finish is not None or output.error is not None
        with self._progress:
            self._tokens += len(output.tokens)
            self._open -= ended
            self._error = self._error or output.error
            again = ended and not self._closing and output.error is None
            number = self._take_number(self._max_tokens) if again else None
            self._progress.notify_all()
        if number is not None:
            self._submit(number)


def measure(subject: Subject) -> dict[str, Any]:
    """Measures reloads to more layers, fewer layers and another model, while all streams generate."""
    sizes = subject.sizes
    candidates = [model for model in subject.models if model.tokenizer_id == subject.models[0].tokenizer_id]
    first = candidates[0]
    engine = subject.engine(first)
    subject.say("latency without reloads")
    prompts = subject.prompts(first, tuple(held_out.DOMAINS), sizes.largest_batch)
    steady = decode.run(engine, prompts, sizes.output_tokens, sizes.largest_batch)
    # The tokens that all streams hold halfway through, prefilled at once.
    middle = sizes.prompt_tokens + sizes.output_tokens // 2
    windows = [window for domain in held_out.DOMAINS for window in subject.windows(first, domain)]
    halfway = [window[:middle] for window in itertools.islice(itertools.cycle(windows), sizes.largest_batch)]
    prefill = decode.run(engine, halfway, 1, sizes.largest_batch)

    subject.say(f"{sizes.reloads} reloads under load")
    # Chunks of prompts are bounded as in services. Other sections have no bound.
    as_served = EngineSettings()
    engine = subject.engine(
        first,
        settings=replace(
            engine.settings,
            step_token_budget=as_served.step_token_budget,
            prefill_stretch=as_served.prefill_stretch,
        ),
    )
    load = _Load(engine, prompts, sizes.output_tokens)
    reloads: list[dict[str, Any]] = []
    engine.start()
    try:
        load.open(sizes.largest_batch)
        load.wait(sizes.largest_batch)
        before = (first.name, first.num_layers)
        for name, depth in itertools.islice(_tour(subject, [one.name for one in candidates]), sizes.reloads):
            began = time.perf_counter()
            done = engine.reload(subject.model(name).path, depth)
            ended = time.perf_counter()
            reloads.append(
                {
                    "to": f"{name} at depth {depth}",
                    "kind": _kind(before, (name, depth)),
                    "sequences_moved": done.sequences_moved,
                    "seconds": ended - began,
                    "stall_seconds": done.stall_seconds,
                    "between": (began, ended),
                }
            )
            before = (name, depth)
            load.wait(_TOKENS_BETWEEN * sizes.largest_batch)
        load.close()
    finally:
        engine.stop()

    stalls = {kind: list[float]() for kind in ("deeper", "shallower", "switch")}
    for reload in reloads:
        stalls[reload["kind"]] += _gaps(load.streams, *reload.pop("between"))
    lost = sum(stream.expected - len(set(stream.indices)) for stream in load.streams)
    repeated = sum(len(stream.indices) - len(set(stream.indices)) for stream in load.streams)
    every = [gap for gaps in stalls.values() for gap in gaps]
    return {
        "streams_at_once": sizes.largest_batch,
        "streams": len(load.streams),
        "output_tokens": sizes.output_tokens,
        "lost": lost,
        "repeated": repeated,
        "out_of_order": sum(stream.indices != sorted(stream.indices) for stream in load.streams),
        "without_reloads": {"tpot_ms": asdict(steady.tpot_ms), "ttft_ms": asdict(steady.ttft_ms)},
        "with_reloads": {
            "tpot_ms": asdict(latency([_tpot(stream) for stream in load.streams if len(stream.times) > 1])),
            "ttft_ms": asdict(latency([stream.times[0] - stream.opened for stream in load.streams])),
        },
        "prefill_of_all_streams_ms": prefill.ttft_ms.p999,
        "stall_ms": {"all": asdict(latency(every))}
        | {kind: asdict(latency(gaps)) for kind, gaps in stalls.items() if gaps},
        "reloads": reloads,
    }


def targets(result: dict[str, Any]) -> list[Target]:
    """Targets: no token is lost or repeated; no stream stalls longer than a prefill of all would take."""
    count = len(result["reloads"])
    wrong = result["lost"] + result["repeated"] + result["out_of_order"]
    limit = 2 * result["without_reloads"]["tpot_ms"]["p99"] + result["prefill_of_all_streams_ms"]
    stall = result["stall_ms"]["all"]["p99"]
    return [
        Target(
            f"tokens lost or repeated over {count} reloads under load",
            "0",
            f"{result['lost']} lost, {result['repeated']} repeated",
            wrong == 0,
        ),
        Target(
            "stall of a stream at a reload, P99",
            f"at most 2x TPOT P99 + one prefill of all streams anew, {limit:.0f} ms",
            f"{stall:.0f} ms",
            stall <= limit,
        ),
    ]


def _tour(subject: Subject, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yields plans without end. For each model: one exit deeper at a time, then back; then the next model."""
    for name in itertools.cycle(names):
        depths = subject.model(name).exit_layers
        for depth in (*depths, *reversed(depths[:-1])):
            yield name, depth


def _kind(before: tuple[str, int], after: tuple[str, int]) -> str:
    if before[0] != after[0]:
        return "switch"
    return "deeper" if after[1] > before[1] else "shallower"


def _gaps(streams: Sequence[_Stream], began: float, ended: float) -> list[float]:
    """For each stream that generated during a reload: its longest gap between two tokens, in seconds."""
    gaps = []
    for stream in streams:
        first = max(bisect.bisect_right(stream.times, began) - 1, 0)
        last = bisect.bisect_left(stream.times, ended)
        times = stream.times[first : last + 1]
        if len(times) > 1:
            gaps.append(max(after - before for before, after in itertools.pairwise(times)))
    return gaps


def _tpot(stream: _Stream) -> float:
    return (stream.times[-1] - stream.times[0]) / (len(stream.times) - 1)
