"""Runs the demo: traffic drifts and a stack follows it; then the same traffic is served in other ways.

One system after the other serves the same prompts through a gateway. Clients always keep the same number of
streams open. In each phase `full` and `dynamic` get the candidate that is best at full depth. HELIOS, with a
router or with a single plan for all requests, has to find what is best.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import grpc

from bench.demo import baselines
from bench.demo.outcome import DYNAMIC, FULL, HELIOS, SINGLE, Outcome, rows_of
from bench.demo.phases import LEAD_IN, PHASES, STREAMS
from bench.demo.progress import Progress, Show
from bench.demo.stack import (
    DECISION_SECONDS,
    await_decision,
    await_rollout,
    check,
    default_orders,
    read_workers,
)
from bench.demo.timeline import Timeline
from bench.demo.watch import Followed, follow
from bench.load import clients
from bench.load.clients import Stream
from bench.load.traffic import Traffic
from bench.quality.judge import Judge, stride
from bench.quality.served import Served, best_of, windows
from bench.systems.bench_stack import bench_stack
from helios.catalog import ModelEntry
from helios.client import error_from
from helios.controller_client import connect
from helios.errors import SettingsError
from helios.modes import Precision
from helios.stack_state import StackState
from helios.v1 import profiler_pb2, profiler_pb2_grpc, worker_pb2

# Shares of the traffic's time. `full` and `dynamic` have the rest.
_HELIOS_SHARE, _SINGLE_SHARE = 0.5, 0.2
# Environment of a stack that serves all requests under a single plan, which is the paper's method.
_SINGLE_PLAN = {"HELIOS_CONTROLLER_ROUTING": "single"}
# Prompts that tell which candidate is best on a phase, before it is served.
_KNOWN_PROMPTS = 64
# Requests of a phase that are judged. Otherwise the judge would take longer than the traffic.
_JUDGED_REQUESTS = 400


def run(running: StackState | None, seconds: float, show: Show) -> Outcome:
    """Serves the phases on the running stack, or on one of its own, then in other ways on further stacks.

    seconds: total time of the traffic. The running stack's objective and pins are put back at the end.
    Raises SettingsError when the running stack's controller does not act on its own, and UnavailableError
    when a part of a stack does not answer.
    """
    with contextlib.ExitStack() as open_ones:
        if running is None:
            show(Progress("starting a stack"))
            state = open_ones.enter_context(bench_stack("--controller", "active", "--profiler"))
        else:
            state = running
        if not state.controller or not state.profiler:
            missing = "profiler" if state.controller else "controller"
            raise SettingsError(
                f"the running stack has no {missing}, so it cannot follow traffic; start it with "
                "`helios up --controller active --profiler`, or stop it: the demo then starts one of its own"
            )
        workers = asyncio.run(read_workers(state.gateway))
        with connect(state.controller) as controller:
            check(controller, workers)
        any_worker = next(iter(workers.values()))
        judge = Judge(
            Path(state.models_dir),
            any_worker.model.tokenizer_id,
            Precision(any_worker.precision),
            lambda what: show(Progress(f"quality: {what}")),
        )
        traffic = Traffic(min(model.context_tokens for model in judge.candidates), judge.tokenizer)
        best = {phase.name: judge.best(traffic.prompts(phase, _KNOWN_PROMPTS)) for phase in PHASES}
        followed = {HELIOS: _follow(HELIOS, state, traffic, seconds * _HELIOS_SHARE, show)}
    options = _options(state, workers)
    show(Progress(f"{SINGLE}: the same traffic; starting its stack"))
    with bench_stack(*options, "--controller", "active", "--profiler", settings=_SINGLE_PLAN) as single:
        followed[SINGLE] = _follow(SINGLE, single, traffic, seconds * _SINGLE_SHARE, show)
    streams: dict[str, Mapping[str, list[Stream]]] = {name: one.streams for name, one in followed.items()}
    slice_seconds = seconds * (1 - _HELIOS_SHARE - _SINGLE_SHARE) / 2 / len(PHASES)
    for mode in (FULL, DYNAMIC):
        show(Progress(f"{mode}: the same traffic; starting its workers"))
        streams[mode] = baselines.serve(mode, options, best, traffic, slice_seconds, show)
    served = _judged(judge, streams, best)
    # One candidate for all systems: the best over all requests of the phase.
    references = {
        phase.name: best_of(
            itertools.chain.from_iterable(of_system[phase.name] for of_system in served.values())
        )
        for phase in PHASES
    }
    return Outcome(
        own_stack=running is None,
        workers=len(workers),
        timelines={name: _timeline(one, served[name], references) for name, one in followed.items()},
        rows=tuple(
            row
            for system, by_phase in served.items()
            for row in rows_of(system, streams[system], by_phase, references)
        ),
        best={phase: judge.candidates[reference].name for phase, reference in references.items()},
    )


def _follow(system: str, state: StackState, traffic: Traffic, seconds: float, show: Show) -> Followed:
    """Serves the phases on a stack with a controller, which begins with the default objective and no pins."""
    with connect(state.controller) as controller, default_orders(controller):
        show(Progress(f"{system}: waiting for the controller's first decision"))
        decided = await_decision(controller, after=0)
        show(Progress(f"{system}: not measured yet: other {PHASES[0].name} prompts, profiled once"))
        asyncio.run(_lead_in(state, traffic))
        await_rollout(controller, await_decision(controller, after=decided.number))
        return asyncio.run(follow(system, state, traffic, seconds / len(PHASES), show))


async def _lead_in(state: StackState, traffic: Traffic) -> None:
    """Serves prompts like the first phase's. The profiler evaluates them, as for `helios profile`."""
    first = itertools.islice(traffic.requests(LEAD_IN), 2 * STREAMS)
    async with clients.connect(state.gateway) as gateway, clients.connect(state.profiler) as profiler:
        await clients.run(clients.through_gateway(gateway), first, STREAMS)
        stub: profiler_pb2_grpc.ProfilerServiceAsyncStub = profiler_pb2_grpc.ProfilerServiceStub(profiler)
        try:
            async for _ in stub.Evaluate(profiler_pb2.EvaluateRequest(), timeout=DECISION_SECONDS):
                pass
        except grpc.aio.AioRpcError as error:
            raise error_from(error, state.profiler) from error


def _options(state: StackState, workers: Mapping[str, worker_pb2.GetStatusResponse]) -> list[str]:
    """Options of `helios up` for a stack like the one that HELIOS had."""
    any_worker = next(iter(workers.values()))
    options = {
        "--models-dir": state.models_dir,
        "--workers": str(len(workers)),
        "--threads": str(max(1, any_worker.threads)),
        "--precision": any_worker.precision,
    }
    return list(itertools.chain.from_iterable(options.items()))


def _judged(
    judge: Judge, streams: Mapping[str, Mapping[str, list[Stream]]], best: Mapping[str, ModelEntry]
) -> dict[str, dict[str, list[Served]]]:
    """Every request, by system and phase. Of all systems the same requests are judged."""
    judged: dict[str, dict[str, list[Served]]] = {system: {} for system in streams}
    for phase in PHASES:
        most = max(len(by_phase[phase.name]) for by_phase in streams.values())
        every = stride(most, _JUDGED_REQUESTS, len(phase.domains))
        for system, by_phase in streams.items():
            judged[system][phase.name] = (
                judge.of_dynamic(by_phase[phase.name], every, best[phase.name])
                if system == DYNAMIC
                else judge.of(by_phase[phase.name], every)
            )
    return judged


def _timeline(
    followed: Followed, served: Mapping[str, list[Served]], references: Mapping[str, int]
) -> Timeline:
    """The timeline with windows, whose times are then seconds since the traffic began."""
    found = [
        replace(window, began=window.began - followed.began)
        for phase, requests in served.items()
        for window in windows(phase, requests, references[phase])
    ]
    return replace(followed.timeline, windows=tuple(found))
