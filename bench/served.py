"""Gateway and worker against `vllm serve`: recorded traffic on the same model, at rates up to capacity."""

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import load, request_trace
from bench.contenders import HELIOS, Contender, awake, needed_bytes
from bench.engine_figures import FIRST_TOKEN
from bench.load import Open, Request, Stream
from bench.local_stack import local_stack
from bench.peers.environment import make_environment
from bench.random_model import SHAPES, random_model
from bench.report import Report, Target
from bench.request_trace import Arrival
from bench.vllm_server import through_http, vllm_server
from helios import catalog
from helios.catalog import ModelEntry
from helios.errors import HeliosError, SettingsError
from helios.footprint import kv_bytes_per_token

VLLM = "vllm"
# As an operator sets it whose clients can wait for tokens as long as vLLM's do: a step with prompts takes at
# most so many times one without. Only what it does at most is measured.
_STRETCH = "6"
HELIOS_STRETCHED = f"{HELIOS}, prefill_stretch {_STRETCH}"
# Offered load, as shares of what each system does at most.
SHARES = (0.4, 0.6, 0.8, 0.9)
_FACTOR = 2.0
_WARM_UP_REQUESTS = 4


@click.command()
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    required=True,
    help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens, such as the Azure LLM inference traces.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write it here.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="opt-125m", show_default=True)
@click.option("--depth", type=click.IntRange(min=1), help="Of Helios. Default: all layers.")
@click.option("--requests", "count", type=click.IntRange(min=8), default=100, show_default=True)
@click.option(
    "--length-scale",
    type=click.FloatRange(min=0, min_open=True),
    default=0.25,
    show_default=True,
    help="Prompts and outputs of the trace are so many times as long, so that a run ends on a small machine.",
)
@click.option("--streams", type=click.IntRange(min=1), default=64, show_default=True, help="Open at once.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Of Helios.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="Of each system.")
@click.option("--without-vllm", is_flag=True, help="Helios alone.")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path.home() / ".cache" / "helios",
    show_default="~/.cache/helios",
    help="Where the peers' environments and the random weights are kept.",
)
@click.option("--fresh", is_flag=True, help="Measure again what the JSON file already holds.")
def served(
    *,
    trace_path: Path,
    json_path: Path | None,
    shape: str,
    depth: int | None,
    count: int,
    length_scale: float,
    streams: int,
    workers: int,
    threads: int,
    without_vllm: bool,
    cache_dir: Path,
    fresh: bool,
) -> None:
    """Requests a second of the whole system under recorded traffic, against vLLM's OpenAI server.

    Both serve the same random weights, one after the other at the same share of their capacity. Every run is
    written to the JSON file when it is done: the same command goes on where it was stopped.
    """
    progress = Console(stderr=True)
    settings = {
        "trace": trace_path.name,
        "shape": shape,
        "depth": depth,
        "requests": count,
        "length_scale": length_scale,
        "streams": streams,
        "workers": workers,
        "threads": threads,
    }
    with progress.status("reading the trace") as status:
        results = _earlier(None if fresh else json_path, settings)
        model = catalog.read_model(random_model(shape, cache_dir / "bench-models"))
        trace = request_trace.shortened(
            request_trace.read(trace_path, count), length_scale, model.context_tokens
        )
        with contextlib.ExitStack() as running:
            systems: dict[str, _System] = {}
            if not without_vllm:
                try:
                    status.update("starting vllm serve")
                    systems[VLLM] = running.enter_context(_vllm(model, cache_dir, threads, streams, trace))
                except HeliosError as error:
                    results["failed"] = {VLLM: str(error)}
            status.update("starting a stack")
            options = ["--models-dir", str(model.path.parent), "--model", model.name]
            options += ["--workers", str(workers), "--threads", str(max(1, threads // workers))]
            options += ["--depth", str(depth or model.num_layers)]
            bench = _Bench(results, trace, model.config.vocab_size, streams, json_path, status.update)
            with local_stack(*options) as state:
                asyncio.run(bench.run(systems, HELIOS, state.gateway, SHARES))
            status.update("starting a stack for throughput")
            with local_stack(*options, settings={"HELIOS_WORKER_PREFILL_STRETCH": _STRETCH}) as state:
                asyncio.run(bench.run({}, HELIOS_STRETCHED, state.gateway, ()))
    report = report_of(results)
    report.show()
    if json_path is not None:
        report.write(json_path)


@dataclass(frozen=True, slots=True)
class _System:
    """What is measured. `awake`: only within it may the system compute, where it can be kept from it."""

    open_stream: Open
    awake: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@contextlib.contextmanager
def _vllm(
    model: ModelEntry, cache_dir: Path, threads: int, streams: int, trace: Sequence[Arrival]
) -> Iterator[_System]:
    """A `vllm serve` of the model. Raises UnavailableError."""
    python = make_environment("vllm", cache_dir / "peers")
    logs = cache_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    longest = max(one.prompt_tokens + one.output_tokens for one in trace)
    config = model.config
    kv_bytes = streams * longest * kv_bytes_per_token(config, config.num_layers, "bfloat16")
    memory = needed_bytes(Contender(VLLM, "bfloat16"), config, kv_bytes)
    share = memory / (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    log = logs / "vllm-serve.log"
    context = config.context_tokens
    with vllm_server(python, model.path, threads, context, streams, kv_bytes, share, log) as server:
        open_stream = through_http(server.host, server.port, str(model.path))
        yield _System(open_stream, lambda: awake(server.process_group))


class _Bench:
    """A run of the bench: what is still to be measured, and the file that takes it."""

    def __init__(
        self,
        results: dict[str, Any],
        trace: Sequence[Arrival],
        vocab_size: int,
        streams: int,
        json_path: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self._results = results
        self._trace = trace
        self._vocab_size = vocab_size
        self._streams = streams
        self._json_path = json_path
        self._say = say

    async def run(
        self, systems: Mapping[str, _System], helios: str, gateway: str, shares: Sequence[float]
    ) -> None:
        """Every system's capacity, then each share of it, the systems by turns.

        helios: name of the one behind the gateway.
        """
        async with load.connect(gateway) as channel:
            every = {**systems, helios: _System(load.through_gateway(channel))}
            for name, system in every.items():
                self._say(f"{name}: warming up")
                with system.awake():
                    first = self._requests(-1)[:_WARM_UP_REQUESTS]
                    await load.run(system.open_stream, first, _WARM_UP_REQUESTS)
            for number, share in enumerate((None, *shares)):
                for name, system in every.items():
                    if any((run["system"], run["share"]) == (name, share) for run in self._results["runs"]):
                        continue
                    with system.awake():
                        await self._measure(name, system.open_stream, share, self._requests(number))

    async def _measure(
        self, name: str, open_stream: Open, share: float | None, requests: Sequence[Request]
    ) -> None:
        rate = None
        before = os.getloadavg()[0]
        if share is None:
            self._say(f"{name}: what it does at most")
            streams = await load.run(open_stream, requests, self._streams)
        else:
            rate = share * capacity(self._results["runs"], name)
            self._say(f"{name}: {rate:.2f} requests/s")
            streams = await replay(open_stream, requests, request_trace.at_rate(self._trace, rate))
        summary = load.summarise(streams)
        self._results["runs"].append(
            {
                "system": name,
                "share": share,
                "rate": rate,
                "requests_per_second": (len(streams) - summary.failed) / summary.seconds,
                "summary": asdict(summary),
                "errors": sorted({stream.error for stream in streams if stream.error}),
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "load_average_before": before,
            }
        )
        if self._json_path is not None:
            report_of(self._results).write(self._json_path)

    def _requests(self, number: int) -> list[Request]:
        """Prompts of random tokens, other ones for each number: none is served from an earlier run's keys
        and values."""
        draw = random.Random(number)
        tokens = range(FIRST_TOKEN, self._vocab_size)
        return [
            Request(tuple(draw.choices(tokens, k=one.prompt_tokens)), one.output_tokens)
            for one in self._trace
        ]


async def replay(open_stream: Open, requests: Sequence[Request], arrivals: Sequence[Arrival]) -> list[Stream]:
    """Opens each request when it arrives, whatever else is open, and waits for all."""
    started = asyncio.get_running_loop().time()

    async def one(index: int, request: Request, arrival: Arrival) -> Stream:
        await asyncio.sleep(started + arrival.seconds - asyncio.get_running_loop().time())
        return await load.consume(open_stream, index, request)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(index, request, arrival))
            for index, (request, arrival) in enumerate(zip(requests, arrivals, strict=True))
        ]
    return [task.result() for task in tasks]


def capacity(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    """Requests a second that a system did when as many as it takes were always open."""
    return float(
        next(run["requests_per_second"] for run in runs if (run["system"], run["share"]) == (name, None))
    )


def report_of(results: dict[str, Any]) -> Report:
    """The report of all runs there are."""
    rows = []
    for run in results["runs"]:
        ttft, tpot = run["summary"]["ttft_ms"], run["summary"]["tpot_ms"]
        offered = "all it can" if run["rate"] is None else f"{run['rate']:.2f} offered"
        rows.append(
            (
                f"{run['system']}, {offered}",
                f"{run['requests_per_second']:.2f} requests/s, {run['summary']['failed']} failed, "
                f"TPOT P50 {tpot['p50']:.1f} P99 {tpot['p99']:.1f} ms, "
                f"TTFT P50 {ttft['p50']:.0f} P99 {ttft['p99']:.0f} ms",
            )
        )
    rows += [(f"failed: {name}", reason) for name, reason in results["failed"].items()]
    compared = at_same_latency(results["runs"])
    rows += [
        (
            f"at vLLM's P99 TPOT of {one['p99_tpot_ms']:.1f} ms",
            f"{one['helios']:.2f} against {one['vllm']:.2f} requests/s: {one['ratio']:.2f}x",
        )
        for one in compared
    ]
    return Report({**results, "at_same_p99_tpot": compared}, targets(compared), rows)


def at_same_latency(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """For each rate at which vLLM served all: the highest at which Helios did with no higher P99 TPOT.

    Rates are of requests served, not offered: of a system that falls behind they are lower. What a system
    does at most is one of them.
    """

    def served(name: str) -> list[tuple[float, float]]:
        return [
            (run["requests_per_second"], run["summary"]["tpot_ms"]["p99"])
            for run in runs
            if run["system"] == name and not run["summary"]["failed"]
        ]

    mine = served(HELIOS) + served(HELIOS_STRETCHED)
    if not mine:
        return []
    found = []
    for rate, tpot in sorted(served(VLLM)):
        best = max((own for own, latency in mine if latency <= tpot), default=0.0)
        found.append({"p99_tpot_ms": tpot, "vllm": rate, "helios": best, "ratio": best / rate})
    return found


def targets(compared: Sequence[Mapping[str, float]]) -> list[Target]:
    """The target, at every rate of vLLM's."""
    if not compared:
        return []
    points = ", ".join(f"{one['ratio']:.2f}x of {one['vllm']:.1f}" for one in compared)
    return [
        Target(
            "requests/s of `vllm serve` at its P99 TPOT, from its lightest load to all it can",
            f">= {_FACTOR:g}x",
            points,
            all(one["ratio"] >= _FACTOR for one in compared),
        )
    ]


def _earlier(path: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run left in the file. Raises SettingsError when it cannot stand beside new runs."""
    if path is None or not path.exists():
        return {"settings": settings, "runs": [], "failed": {}}
    try:
        results = json.loads(path.read_text())["results"]
        before, runs = results["settings"], results["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} holds no results of this bench; name another file or --fresh") from error
    if before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise SettingsError(f"{path} was measured with other {changed}; name another file or --fresh")
    return {"settings": settings, "runs": runs, "failed": {}}
