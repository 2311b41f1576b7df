"""The same traffic without HELIOS: workers that keep the exit mode `full` or `dynamic`."""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import grpc

from bench.demo.phases import PHASES, STREAMS
from bench.demo.progress import Progress, Show
from bench.demo.stack import ANSWER_SECONDS
from bench.load import clients
from bench.load.clients import Stream
from bench.load.traffic import Traffic
from bench.systems.bench_stack import bench_stack
from helios.catalog import ModelEntry
from helios.client import AsyncClient, error_from
from helios.stack_state import StackState
from helios.v1 import worker_pb2, worker_pb2_grpc

_WARM_UP_TOKENS = 8
_RELOAD_SECONDS = 600.0


def serve(
    mode: str,
    options: Sequence[str],
    best: Mapping[str, ModelEntry],
    traffic: Traffic,
    seconds: float,
    show: Show,
) -> dict[str, list[Stream]]:
    """Serves each phase for `seconds` by its best candidate, in exit mode `mode`.

    options: of `helios up`. best: by phase. The workers load all layers. Returns every stream by phase.
    """
    with bench_stack(*options, "--model", best[PHASES[0].name].name, "--exit-mode", mode) as baseline:
        return asyncio.run(_serve_phases(mode, baseline, best, traffic, seconds, show))


async def _serve_phases(
    mode: str,
    state: StackState,
    best: Mapping[str, ModelEntry],
    traffic: Traffic,
    seconds: float,
    show: Show,
) -> dict[str, list[Stream]]:
    served = {}
    total = seconds * len(PHASES)
    async with clients.connect(state.gateway) as gateway, AsyncClient(state.gateway) as client:
        through = clients.through_gateway(gateway)
        for index, phase in enumerate(PHASES):
            show(Progress(f"{mode}: {phase.name} prompts", index * seconds, total))
            await _reload_all(client, best[phase.name])
            first = itertools.islice(traffic.requests(phase, seconds), STREAMS)
            await clients.run(through, [replace(one, max_tokens=_WARM_UP_TOKENS) for one in first], STREAMS)
            served[phase.name] = await clients.run(through, traffic.requests(phase, seconds), STREAMS)
    return served


async def _reload_all(client: AsyncClient, model: ModelEntry) -> None:
    for worker in (await client.status(ANSWER_SECONDS)).workers:
        async with clients.connect(worker.address) as channel:
            stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
            request = worker_pb2.ReloadRequest(model=model.name, depth=model.num_layers)
            try:
                async for _ in stub.Reload(request, timeout=_RELOAD_SECONDS):
                    pass
            except grpc.aio.AioRpcError as error:
                raise error_from(error, worker.address) from error
