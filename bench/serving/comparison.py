"""Gateway and workers against `vllm serve`: recorded traffic on the same model, at rates up to capacity."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.load import clients, request_trace
from bench.load.clients import Open, Request, Stream
from bench.load.request_trace import Arrival
from bench.peers.contenders import HELIOS, Contender, awake, needed_bytes
from bench.peers.environment import make_environment
from bench.peers.vllm_server import through_http, vllm_server
from bench.results import Report, Target, earlier
from bench.systems.bench_stack import bench_stack
from bench.systems.random_model import random_model
from bench.systems.shapes import FIRST_TOKEN
from helios import catalog
from helios.catalog import ModelEntry
from helios.errors import HeliosError
from helios.footprint import kv_bytes_per_token

VLLM = "vllm"
# A second value of `prefill_stretch`. An operator would choose it if clients can wait for tokens as long as
# vLLM's clients do. Only the capacity is measured with it.
_STRETCH = "6"
HELIOS_STRETCHED = f"{HELIOS}, prefill_stretch {_STRETCH}"
# The offered loads, as shares of each system's capacity.
SHARES = (0.4, 0.6, 0.8, 0.9)
_FACTOR = 2.0
_WARM_UP_REQUESTS = 4


def compare(
    trace_path: Path,
    shape: str,
    *,
    depth: int | None,
    count: int,
    length_scale: float,
    streams: int,
    workers: int,
    threads: int,
    with_vllm: bool,
    cache_dir: Path,
    json_path: Path | None,
    fresh: bool,
    say: Callable[[str], None],
) -> Report:
    """Serves the first `count` requests of a trace at several rates, with and without vLLM beside Helios.

    shape: name of the model, whose weights are random. depth: Helios's depth; None: all layers. length_scale:
    factor for the trace's lengths of prompts and outputs. Every run is written to `json_path` when it is
    done. Raises SettingsError when the file was measured with other settings.
    """
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
    results = earlier(None if fresh else json_path, {"settings": settings, "runs": []})
    results["failed"] = {}
    model = catalog.read_model(random_model(shape, cache_dir / "bench-models"))
    trace = request_trace.shortened(request_trace.read(trace_path, count), length_scale, model.context_tokens)
    with contextlib.ExitStack() as running:
        systems: dict[str, _System] = {}
        if with_vllm:
            try:
                say("starting vllm serve")
                systems[VLLM] = running.enter_context(_vllm(model, cache_dir, threads, streams, trace))
            except HeliosError as error:
                results["failed"] = {VLLM: str(error)}
        say("starting a stack")
        options = ["--models-dir", str(model.path.parent), "--model", model.name]
        options += ["--workers", str(workers), "--threads", str(max(1, threads // workers))]
        options += ["--depth", str(depth or model.num_layers)]
        comparison = _Comparison(results, trace, model.config.vocab_size, streams, json_path, say)
        with bench_stack(*options) as state:
            asyncio.run(comparison.run(systems, HELIOS, state.gateway, SHARES))
        say("starting a stack for throughput")
        with bench_stack(*options, settings={"HELIOS_WORKER_PREFILL_STRETCH": _STRETCH}) as state:
            asyncio.run(comparison.run({}, HELIOS_STRETCHED, state.gateway, ()))
    return report_of(results)


@dataclass(frozen=True, slots=True)
class _System:
    """A system that is measured. If it can be paused, it computes only inside `awake`."""

    open_stream: Open
    awake: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@contextlib.contextmanager
def _vllm(
    model: ModelEntry, cache_dir: Path, threads: int, streams: int, trace: Sequence[Arrival]
) -> Iterator[_System]:
    """Runs `vllm serve` with the model. Raises UnavailableError."""
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


class _Comparison:
    """A run of the comparison: the results so far, and the file that keeps them."""

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
        """Measures the capacity of every system, then each share of it. The systems take turns.

        helios: name of the system behind the gateway.
        """
        async with clients.connect(gateway) as channel:
            every = {**systems, helios: _System(clients.through_gateway(channel))}
            for name, system in every.items():
                self._say(f"{name}: warming up")
                with system.awake():
                    first = self._requests(-1)[:_WARM_UP_REQUESTS]
                    await clients.run(system.open_stream, first, _WARM_UP_REQUESTS)
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
            streams = await clients.run(open_stream, requests, self._streams)
        else:
            rate = share * capacity(self._results["runs"], name)
            self._say(f"{name}: {rate:.2f} requests/s")
            streams = await replay(open_stream, requests, request_trace.at_rate(self._trace, rate))
        summary = clients.summarise(streams)
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
        """Prompts of random tokens. They differ for each number, so that none is served from KV that an
        earlier run cached."""
        draw = random.Random(number)
        tokens = range(FIRST_TOKEN, self._vocab_size)
        return [
            Request(tuple(draw.choices(tokens, k=one.prompt_tokens)), one.output_tokens)
            for one in self._trace
        ]


async def replay(open_stream: Open, requests: Sequence[Request], arrivals: Sequence[Arrival]) -> list[Stream]:
    """Opens each request at its arrival time, however many are open, and waits for all of them."""
    started = asyncio.get_running_loop().time()

    async def one(index: int, request: Request, arrival: Arrival) -> Stream:
        await asyncio.sleep(started + arrival.seconds - asyncio.get_running_loop().time())
        return await clients.consume(open_stream, index, request)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(index, request, arrival))
            for index, (request, arrival) in enumerate(zip(requests, arrivals, strict=True))
        ]
    return [task.result() for task in tasks]


def capacity(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    """Requests per second of a system at full load."""
    return float(
        next(run["requests_per_second"] for run in runs if (run["system"], run["share"]) == (name, None))
    )


def report_of(results: dict[str, Any]) -> Report:
    """The report of all runs so far."""
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
    """For each rate at which vLLM served all requests: Helios's highest rate with no higher P99 TPOT.

    Rates are of served requests, not of offered ones, so they are lower when a system falls behind. The
    capacity is one of the rates.
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
    """The target, for every rate of vLLM."""
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
