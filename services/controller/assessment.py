"""Asking the profiler to evaluate the candidates on recent requests (arXiv 2504.10724)."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from helios import channel
from helios.v1 import profiler_pb2, profiler_pb2_grpc
from services.controller.agenda import Evaluate


@dataclass(frozen=True, slots=True)
class Assessment:
    """What an evaluation of the candidates cost, and what went wrong, in words; empty when nothing did."""

    cpu_seconds: float = 0.0
    """Without what is done once for a model: loading it, timing its steps."""
    problem: str = ""


async def evaluate(
    address: str, models: Sequence[str], due: Evaluate, *, connect_seconds: float, timeout_seconds: float
) -> Assessment:
    """Has the profiler at `address` evaluate the models as it is due; the results go to Redis."""
    cpu_seconds = 0.0
    request = profiler_pb2.EvaluateRequest(
        models=models,
        requests=due.requests,
        fresh=due.fresh,
        newest_seconds=due.newest_seconds,
        prompts_only=due.prompts_only,
    )
    try:
        async with channel.to_service_async(address) as opened:
            async with asyncio.timeout(connect_seconds):
                await opened.channel_ready()
            stub: profiler_pb2_grpc.ProfilerServiceAsyncStub
            stub = profiler_pb2_grpc.ProfilerServiceStub(opened)
            async for response in stub.Evaluate(request, timeout=timeout_seconds):
                if response.HasField("result"):
                    result = response.result
                    cpu_seconds += max(0.0, result.cpu_seconds - result.once_cpu_seconds)
    except grpc.aio.AioRpcError as error:
        said = f"{error.code().name}, {error.details()}"
    except TimeoutError:
        said = "it cannot be reached"
    else:
        return Assessment(cpu_seconds)
    return Assessment(
        cpu_seconds,
        f"the profiler at {address} did not evaluate, decisions rest on the last profiles: {said}",
    )
