"""Measures what profiling and control cost: the same load on saturated services, with and without them.

The controller only advises, so both stacks serve the same plan. The difference in throughput is the cost of
watching, profiling and deciding.
"""

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bench.load import clients
from bench.load.clients import Request
from bench.results import Target
from bench.systems.bench_stack import bench_stack, cpu_seconds
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.stack_state import StackState
from helios.v1 import controller_pb2, controller_pb2_grpc
from services.controller.settings import ControllerSettings

_TARGET = 0.02
# The two rounds with control follow each other, so that few reassessments fall due while that stack is idle.
_ORDER = ("without", "with", "with", "without")
_BESIDE = ("profiler", "controller")
_START_SECONDS = 300.0
# Length of the warm-up as a share of a round. Prompts of every length occur in it.
_WARM_UP_SHARE = 0.1


def measure(subject: Subject) -> dict[str, Any]:
    """Throughput with and without profiler and controller, in turns, and the CPU time that these used."""
    model = subject.models[0]
    served = ("--model", model.name, "--precision", subject.precision)
    options = ("--models-dir", str(model.path.parent), *served)
    subject.say("starting two stacks, one with profiler and controller")
    with (
        bench_stack(*options) as plain,
        bench_stack(*options, "--profiler", "--controller", "advisory") as watched,
    ):
        return asyncio.run(_measure(subject, {"without": plain, "with": watched}))


def targets(result: dict[str, Any]) -> list[Target]:
    """The target for the cost in throughput."""
    low, high = min(result["costs"]), max(result["costs"])
    shares = ", ".join(f"{name} {share:.2%}" for name, share in result["cpu_share"].items())
    return [
        Target(
            "cost of profiling and control, saturated, through real services",
            f"at most {_TARGET:.0%} of throughput",
            f"{result['throughput_cost']:.1%} (rounds {low:+.1%} to {high:+.1%}); of the CPU: {shares}",
            result["throughput_cost"] <= _TARGET,
        )
    ]


async def _measure(subject: Subject, stacks: dict[str, StackState]) -> dict[str, Any]:
    sizes = subject.sizes
    prompts = subject.prompts(subject.models[0], tuple(held_out.DOMAINS), sizes.saturating_requests)
    requests = [Request(tuple(prompt), sizes.output_tokens) for prompt in prompts]
    watched = stacks["with"]
    await first_decision(watched)
    pids = {name: watched.processes[name] for name in _BESIDE}
    rates: dict[str, list[float]] = {name: [] for name in stacks}
    used, seconds = dict.fromkeys(_BESIDE, 0.0), 0.0
    for stack in stacks.values():
        await _serve(stack, requests, sizes.control_seconds * _WARM_UP_SHARE, sizes.largest_batch)
    for name in itertools.islice(itertools.cycle(_ORDER), sizes.control_rounds * len(_ORDER)):
        subject.say(f"saturated, {name} profiler and controller")
        before = {part: cpu_seconds(pid) for part, pid in pids.items()}
        began = time.monotonic()
        rates[name].append(await _serve(stacks[name], requests, sizes.control_seconds, sizes.largest_batch))
        if name == "with":
            seconds += time.monotonic() - began
            for part, pid in pids.items():
                used[part] += cpu_seconds(pid) - before[part]
    costs = [1 - with_it / without for with_it, without in zip(rates["with"], rates["without"], strict=True)]
    decisions = await _decisions(watched)
    cores = len(os.sched_getaffinity(0))
    return {
        "concurrency": sizes.largest_batch,
        "seconds_per_round": sizes.control_seconds,
        "profiling_share": ControllerSettings.model_fields["profiling_share"].default,
        "tokens_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "rates": rates,
        # The median, so that one disturbed round does not decide.
        "throughput_cost": statistics.median(costs),
        "costs": costs,
        "cpu_share": {part: spent / seconds / cores for part, spent in used.items()},
        "reassessments": sum(one.trigger == "reassessment" for one in decisions),
        "put_off": sum("put off" in one.reason for one in decisions),
    }


async def _serve(stack: StackState, requests: Sequence[Request], seconds: float, concurrency: int) -> float:
    """Tokens per second while `concurrency` streams are open for `seconds`.

    Raises AssertionError when a stream fails, because the throughput would then be wrong.
    """
    deadline = time.monotonic() + seconds

    def until_deadline() -> Iterator[Request]:
        # At least one request for each stream.
        yield from requests[:concurrency]
        for request in itertools.cycle(requests):
            if time.monotonic() > deadline:
                return
            yield request

    async with clients.connect(stack.gateway) as channel:
        streams = await clients.run(clients.through_gateway(channel), until_deadline(), concurrency)
    summary = clients.summarise(streams)
    assert summary.failed == 0, next(stream.error for stream in streams if stream.error)
    return summary.tokens_per_second


async def first_decision(stack: StackState) -> None:
    """Waits for the first profile of the candidates, because only that evaluation times steps."""
    async with clients.connect(stack.controller) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        request = controller_pb2.WatchDecisionsRequest(history=1)
        async for _ in stub.WatchDecisions(request, timeout=_START_SECONDS, wait_for_ready=True):
            return


async def _decisions(stack: StackState) -> list[controller_pb2.Decision]:
    async with clients.connect(stack.controller) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        request = controller_pb2.WatchDecisionsRequest(history=1000, once=True)
        return [one.decision async for one in stub.WatchDecisions(request, timeout=_START_SECONDS)]
