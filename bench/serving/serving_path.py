"""The serving path under load: throughput, latency, cost of the gateway, parity, and memory by depth."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from tokenizers import Tokenizer

from bench.load import clients
from bench.load.clients import Request, Stream, Summary
from bench.load.latency import percentile
from bench.peers import reference
from bench.results import Report, Target
from bench.systems.bench_stack import bench_stack, cpu_seconds
from helios import catalog
from helios.catalog import ModelEntry
from helios.errors import InvalidRequestError
from helios.stack_state import StackState
from helios.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc

_PROMPTS = Path(__file__).with_name("prompts.json")
_SHORTEST_PROMPT = 2
_WARM_UP_TOKENS = 8
# Runs through the gateway alternate with direct ones, so that other work on the machine slows both alike.
_ROUNDS = 3
# The target for 64 streams on 2 cores like those of the README's figures.
_GATEWAY_CPU_TARGET_US = 50.0


@dataclass(frozen=True, slots=True)
class _Measured:
    """The measurements of one stack."""

    gateway: list[Summary]
    direct: list[Summary]
    gateway_cpu_us_per_token: list[float]
    streams: list[Stream]
    status: list[worker_pb2.GetStatusResponse]


def measure(
    streams: int,
    max_tokens: int,
    *,
    workers: int | None,
    models_dir: Path | None,
    model: str | None,
    depth: int | None,
    say: Callable[[str], None],
) -> Report:
    """Greedy streams of `max_tokens` tokens, `streams` at once, through the gateway and straight to workers.

    Starts a stack for that. Then it starts one whose worker has all layers, to compare their memory. None as
    an option means the default of `helios up`.
    """
    directory = catalog.find_models_dir(models_dir)
    # In float32, because the tokens are compared with those of transformers.
    options = ["--models-dir", str(directory), "--precision", "float32"]
    options += ["--workers", str(workers)] if workers else []
    options += ["--model", model] if model else []
    with bench_stack(*options, *(["--depth", str(depth)] if depth else [])) as state:
        say(f"{streams} streams x {max_tokens} tokens, {_ROUNDS} times each way")
        measured = asyncio.run(_measure(state, streams, max_tokens))
    entry = catalog.find_model(directory, state.model)
    say(f"the same {streams} streams with transformers")
    parity = asyncio.run(_compare(entry, state.depth, measured.streams))
    say(f"memory of all {entry.num_layers} layers")
    one_worker = [*options, "--model", entry.name, "--workers", "1"]
    with bench_stack(*one_worker, "--depth", str(entry.num_layers)) as full_state:
        full = asyncio.run(_status_of_workers(full_state.gateway))[0]
    return _report(measured, parity, full, streams)


async def _measure(state: StackState, concurrency: int, max_tokens: int) -> _Measured:
    gateway_pid = state.processes["gateway"]
    async with clients.connect(state.gateway) as gateway:
        addresses = await _worker_addresses(gateway)
        workers = [clients.connect(address) for address in addresses]
        try:
            stubs = [worker_pb2_grpc.WorkerServiceStub(worker) for worker in workers]
            # Memory is read before any load, as it is for the full model.
            status = [await stub.GetStatus(worker_pb2.GetStatusRequest()) for stub in stubs]
            answer = await stubs[0].GetTokenizer(worker_pb2.GetTokenizerRequest())
            tokenizer = Tokenizer.from_buffer(answer.tokenizer_json)
            requests = make_requests(tokenizer, concurrency, max_tokens, status[0].model.context_tokens)
            through, straight = clients.through_gateway(gateway), clients.straight_to_workers(workers)
            for open_stream in (through, straight):
                warm_up = [Request(request.prompt_ids, _WARM_UP_TOKENS) for request in requests]
                await clients.run(open_stream, warm_up, concurrency)
            by_gateway, direct, cpu_us, streams = [], [], [], list[Stream]()
            for _ in range(_ROUNDS):
                cpu_before = cpu_seconds(gateway_pid)
                served = await clients.run(through, requests, concurrency)
                cpu = cpu_seconds(gateway_pid) - cpu_before
                by_gateway.append(clients.summarise(served))
                cpu_us.append(cpu * 1e6 / by_gateway[-1].tokens if by_gateway[-1].tokens else math.nan)
                served_directly = await clients.run(straight, requests, concurrency)
                direct.append(clients.summarise(served_directly))
                streams += [*served, *served_directly]
            return _Measured(by_gateway, direct, cpu_us, streams, status)
        finally:
            for worker in workers:
                await worker.close()


def make_requests(tokenizer: Tokenizer, count: int, max_tokens: int, context_tokens: int) -> list[Request]:
    """Requests with prompts of mixed lengths. A prompt that is used again is cut shorter, so all differ.

    Raises InvalidRequestError when the context leaves no room for prompts.
    """
    room = context_tokens - max_tokens
    if room < _SHORTEST_PROMPT:
        raise InvalidRequestError(f"--max-tokens {max_tokens} fills the model's context of {context_tokens}")
    texts = json.loads(_PROMPTS.read_text())
    requests = []
    for index in range(count):
        round_, position = divmod(index, len(texts))
        ids = tokenizer.encode(texts[position]).ids
        requests.append(
            Request(tuple(ids[: min(room, max(_SHORTEST_PROMPT, len(ids) - round_))]), max_tokens)
        )
    return requests


async def _worker_addresses(gateway: grpc.aio.Channel) -> list[str]:
    stub = inference_pb2_grpc.InferenceServiceStub(gateway)
    status = await stub.GetServingStatus(inference_pb2.GetServingStatusRequest())
    return [worker.address for worker in status.workers if worker.ready]


async def _status_of_workers(gateway_address: str) -> list[worker_pb2.GetStatusResponse]:
    async with clients.connect(gateway_address) as gateway:
        found = []
        for address in await _worker_addresses(gateway):
            async with clients.connect(address) as worker:
                stub = worker_pb2_grpc.WorkerServiceStub(worker)
                found.append(await stub.GetStatus(worker_pb2.GetStatusRequest()))
        return found


@dataclass(frozen=True, slots=True)
class _Parity:
    """Compares streams with the reference. A margin is the reference's highest logit minus its second."""

    streams: int
    equal: int
    margins_at_first_difference: list[float]


async def _compare(entry: ModelEntry, depth: int, streams: Sequence[Stream]) -> _Parity:
    prompts = list(dict.fromkeys(stream.request.prompt_ids for stream in streams))
    job = reference.Job(
        checkpoint=str(entry.path),
        depth=depth,
        max_tokens=streams[0].request.max_tokens,
        prompts=prompts,
    )
    expected = dict(zip(prompts, await reference.generate(job), strict=True))
    equal, margins = 0, []
    for stream in streams:
        wanted = expected[stream.request.prompt_ids]
        if stream.token_ids == wanted.token_ids:
            equal += 1
            continue
        pairs = zip(stream.token_ids, wanted.token_ids, wanted.margins, strict=False)
        margins += [margin for got, want, margin in pairs if got != want][:1]
    return _Parity(len(streams), equal, margins)


def _report(
    measured: _Measured, parity: _Parity, full: worker_pb2.GetStatusResponse, concurrency: int
) -> Report:
    gateway, direct = _median_run(measured.gateway), _median_run(measured.direct)
    cpu_us = percentile(measured.gateway_cpu_us_per_token, 0.5)
    # It is None when all tokens of a stream came in one message.
    slowdown = gateway.tpot_ms.p50 / direct.tpot_ms.p50 if direct.tpot_ms.p50 else None
    against = "" if slowdown is None else f"; TPOT P50 {slowdown:.2f} x"
    failed = sum(run.failed for run in (*measured.gateway, *measured.direct))
    part = measured.status[0]
    results = {
        "model": part.model.name,
        "depth": part.model.depth,
        "num_layers": part.model.num_layers,
        "exit_mode": part.exit_mode,
        "workers": len(measured.status),
        "threads_per_worker": part.threads,
        "concurrent_streams": concurrency,
        "gateway": asdict(gateway),
        "straight_to_workers": asdict(direct),
        "gateway_overhead": {
            "cpu_us_per_token": cpu_us,
            "tpot_ms": gateway.tpot_ms.p50 - direct.tpot_ms.p50,
            "tpot_ratio": slowdown,
        },
        "parity": asdict(parity),
        "memory": {"at_depth": _memory(part), "full": _memory(full)},
        "runs": {
            "gateway": [asdict(run) for run in measured.gateway],
            "straight_to_workers": [asdict(run) for run in measured.direct],
            "gateway_cpu_us_per_token": measured.gateway_cpu_us_per_token,
        },
    }
    targets = [
        Target("no stream fails", "0", failed, failed == 0),
        Target(
            "streams equal transformers' greedy output",
            f"{parity.streams}",
            parity.equal,
            parity.equal == parity.streams,
        ),
        Target(
            "gateway CPU per token",
            f"at most {_GATEWAY_CPU_TARGET_US:g} us",
            f"{cpu_us:.0f} us",
            cpu_us <= _GATEWAY_CPU_TARGET_US,
        ),
    ]
    if part.model.depth < full.model.depth:
        for name, at_depth, whole in (
            ("bytes read at this depth", part.bytes_read, full.bytes_read),
            ("weights in memory at this depth", part.model.weight_bytes, full.model.weight_bytes),
        ):
            target = f"below the {whole:,} of all layers"
            targets.append(Target(name, target, at_depth, at_depth < whole))
    rows = [
        ("model", f"{part.model.name}, {part.model.depth} of {part.model.num_layers} layers"),
        ("workers", f"{len(measured.status)} x {part.threads} threads"),
        ("load", f"{gateway.streams} streams, {concurrency} at once, {gateway.tokens} tokens"),
        *_rows("through the gateway", gateway),
        *_rows("straight to the workers", direct),
        ("gateway overhead", f"{cpu_us:.0f} us of CPU per token{against}"),
        ("KV pool", f"{_kv_pool_bytes(part):,} bytes; all layers: {_kv_pool_bytes(full):,}"),
        ("resident memory", f"{part.resident_bytes:,} bytes; all layers: {full.resident_bytes:,}"),
        ("weights in memory", f"{part.model.weight_bytes:,} bytes; all layers: {full.model.weight_bytes:,}"),
        ("bytes read", f"{part.bytes_read:,}; all layers: {full.bytes_read:,}"),
        ("KV per token", f"{part.model.kv_bytes_per_token:,}; all layers: {full.model.kv_bytes_per_token:,}"),
    ]
    return Report(results, targets, rows)


def _median_run(runs: Sequence[Summary]) -> Summary:
    return sorted(runs, key=lambda run: run.tokens_per_second)[len(runs) // 2]


def _memory(status: worker_pb2.GetStatusResponse) -> dict[str, int]:
    return {
        "depth": status.model.depth,
        "bytes_read": status.bytes_read,
        "weight_bytes": status.model.weight_bytes,
        "kv_bytes_per_token": status.model.kv_bytes_per_token,
        "kv_pool_bytes": _kv_pool_bytes(status),
        "resident_bytes": status.resident_bytes,
    }


def _kv_pool_bytes(status: worker_pb2.GetStatusResponse) -> int:
    return status.telemetry.blocks_total * status.block_tokens * status.model.kv_bytes_per_token


def _rows(name: str, run: Summary) -> list[tuple[str, str]]:
    ttft, tpot = run.ttft_ms, run.tpot_ms
    return [
        (name, f"{run.tokens_per_second:,.0f} tokens/s"),
        ("  TTFT", f"P50 {ttft.p50:.1f} ms, P99 {ttft.p99:.1f} ms"),
        ("  TPOT", f"P50 {tpot.p50:.2f} ms, P99 {tpot.p99:.2f} ms"),
    ]
