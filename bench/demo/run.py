"""Runs the demo: traffic drifts and a stack follows it; then the same traffic is served without HELIOS.

One system after the other serves the same prompts through a gateway. Clients always keep the same number of
streams open. In each phase `full` and `dynamic` get the candidate that is best at full depth. HELIOS
has to find it.
"""

import asyncio
import contextlib
import itertools
import math
from pathlib import Path

import grpc

from bench.demo import baselines
from bench.demo.judge import Judge
from bench.demo.outcome import Outcome, followed_after, rows_of, tokens_of
from bench.demo.progress import Progress, Show
from bench.demo.stack import (
    DECISION_SECONDS,
    await_decision,
    await_rollout,
    check,
    default_orders,
    read_workers,
)
from bench.demo.traffic import PHASES, STREAMS, Traffic
from bench.demo.watch import follow
from bench.load import clients
from bench.systems.local_stack import local_stack
from helios.client import error_from
from helios.controller_client import connect
from helios.errors import SettingsError
from helios.modes import Precision
from helios.stack_state import StackState
from helios.v1 import profiler_pb2, profiler_pb2_grpc

# HELIOS's share of the traffic's time; `full` and `dynamic` share the rest.
_HELIOS_SHARE = 0.7


def run(running: StackState | None, seconds: float, show: Show) -> Outcome:
    """Serves the phases on the running stack, or on one of its own, then in modes `full` and `dynamic`.

    seconds: total time of the traffic. The running stack's objective and pins are put back at the end.
    Raises SettingsError when the running stack's controller does not act on its own, and UnavailableError
    when a part of a stack does not answer.
    """
    with contextlib.ExitStack() as open_ones:
        if running is None:
            show(Progress("starting a stack"))
            state = open_ones.enter_context(local_stack("--controller", "active", "--profiler"))
        else:
            state = running
        if not state.controller or not state.profiler:
            missing = "profiler" if state.controller else "controller"
            raise SettingsError(
                f"the running stack has no {missing}, so it cannot follow traffic; start it with "
                "`helios up --controller active --profiler`, or stop it: the demo then starts one of its own"
            )
        controller = open_ones.enter_context(connect(state.controller))
        workers = asyncio.run(read_workers(state.gateway))
        check(controller, workers)
        any_worker = next(iter(workers.values()))
        judge = Judge(
            Path(state.models_dir),
            any_worker.model.tokenizer_id,
            Precision(any_worker.precision),
            lambda what: show(Progress(f"quality: {what}")),
        )
        traffic = Traffic(judge.best(PHASES[0]), judge.tokenizer)
        open_ones.enter_context(default_orders(controller))
        show(Progress("waiting for the controller's first decision"))
        decided = await_decision(controller, after=0)
        # The traffic before the demo must not make the first phase look like a drift.
        show(Progress(f"not measured yet: {PHASES[0].name} prompts, profiled once"))
        asyncio.run(_lead_in(state, traffic))
        await_rollout(controller, await_decision(controller, after=decided.number))
        phase_seconds = seconds * _HELIOS_SHARE / len(PHASES)
        timeline, followed = asyncio.run(follow(state, traffic, judge, phase_seconds, show))
    slice_seconds = seconds * (1 - _HELIOS_SHARE) / 2 / len(PHASES)
    rows = []
    for mode in ("full", "dynamic"):
        show(Progress(f"{mode}: the same traffic; starting its workers"))
        served = baselines.serve(mode, state, workers, traffic, judge, slice_seconds, show)
        # The others are compared with `full`.
        found = [(0.0, 1.0) if mode == "full" else judge.of_dynamic(phase) for phase in PHASES]
        rows += rows_of(
            mode,
            served,
            {
                phase.name: [(tokens_of(served[phase.name]), *of_phase)]
                for phase, of_phase in zip(PHASES, found, strict=True)
            },
        )
    rows += rows_of(
        "HELIOS",
        followed,
        {
            phase.name: [
                (sample.tokens, sample.perplexity_increase, sample.agreement)
                for sample in timeline.samples
                if sample.phase == phase.name
            ]
            for phase in PHASES
        },
    )
    return Outcome(
        own_stack=running is None,
        workers=len(workers),
        timeline=timeline,
        rows=tuple(rows),
        followed_after={phase.name: followed_after(phase, timeline) for phase in PHASES},
        best={phase.name: judge.best(phase).name for phase in PHASES},
    )


async def _lead_in(state: StackState, traffic: Traffic) -> None:
    """Serves prompts of the first phase, and has the profiler evaluate them, as `helios profile` does."""
    first = itertools.islice(traffic.requests(PHASES[0], math.inf), 2 * STREAMS)
    async with clients.connect(state.gateway) as gateway, clients.connect(state.profiler) as profiler:
        await clients.run(clients.through_gateway(gateway), first, STREAMS)
        stub: profiler_pb2_grpc.ProfilerServiceAsyncStub = profiler_pb2_grpc.ProfilerServiceStub(profiler)
        try:
            async for _ in stub.Evaluate(profiler_pb2.EvaluateRequest(), timeout=DECISION_SECONDS):
                pass
        except grpc.aio.AioRpcError as error:
            raise error_from(error, state.profiler) from error
