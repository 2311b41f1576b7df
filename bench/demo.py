"""The HELIOS loop, served: traffic drifts, a stack follows it; then the same traffic without HELIOS.

One system after the other serves the same prompts through a gateway, from clients that always keep the same
number of streams open. `full` and `dynamic` are given, for each phase, the candidate that is best at full
depth: they are told what HELIOS has to find out.
"""

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc
import numpy as np
from tokenizers import Tokenizer

from bench import held_out, load
from bench.load import Latency, Request, Stream
from bench.local_stack import local_stack
from bench.report import Report, Target
from bench.subject import Sizes, Subject
from bench.timeline import Mark, Sample, Timeline, WorkerSample
from helios import catalog
from helios.client import AsyncClient, error_from
from helios.controller_client import ControllerClient, connect
from helios.engine.evaluation.trace import trace_dynamic
from helios.engine.threads import set_threads
from helios.errors import SettingsError, UnavailableError
from helios.hardware import available_memory
from helios.modes import Precision
from helios.rates import rates
from helios.slo import Slo
from helios.stack_state import StackState
from helios.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    inference_pb2,
    profiler_pb2,
    profiler_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

STREAMS = 32
ALL = "all"
# Of a model with room for them.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 96, 48
_SAMPLE_SECONDS = 0.25
# Of the traffic's time; `full` and `dynamic` share the rest.
_HELIOS_SHARE = 0.7
_WARM_UP_TOKENS = 8
# Seconds, a share of the tokens, and a ratio of tokens a second.
_FOLLOW_TARGET, _WITHIN_TARGET, _RATIO_TARGET = 2.0, 0.95, 1.4
# A profiler that has just been started imports its engine first, and evaluates beside other work.
_DECISION_SECONDS = 120.0
_LOOK_SECONDS = 0.1
_START_SECONDS = 60.0
_ANSWER_SECONDS = 10.0
_RELOAD_SECONDS = 600.0
_HELD_OUT = Sizes(window_tokens=192, windows=20, prompt_tokens=32, forced_tokens=96, forced_windows=20)


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of traffic, and the kinds of text that its prompts are cut from, by turns."""

    name: str
    domains: tuple[str, ...]


PHASES = (*(Phase(domain, (domain,)) for domain in held_out.DOMAINS), Phase("mix", tuple(held_out.DOMAINS)))


@dataclass(frozen=True, slots=True)
class Progress:
    """What there is to show. `samples` and `marks` are of the run so far."""

    stage: str
    seconds: float = 0.0
    total_seconds: float = 0.0
    samples: Sequence[Sample] = ()
    marks: Sequence[Mark] = ()


Show = Callable[[Progress], None]
# Tokens of one quality, their rise of perplexity and agreement.
_Part = tuple[int, float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """How one system served one phase, or all of them. Quality is relative to the best candidate."""

    system: str
    phase: str
    streams: int
    failed: int
    # Why streams failed, each reason once.
    errors: tuple[str, ...]
    seconds: float
    tokens_per_second: float
    ttft_ms: Latency
    tpot_ms: Latency
    perplexity_increase: float
    agreement: float
    # Share of the tokens from plans within the bound on perplexity.
    within_bound: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that the demo found."""

    own_stack: bool
    workers: int
    timeline: Timeline
    # Of every system each phase, then all of them.
    rows: tuple[Row, ...]
    # By phase: seconds until the plan's perplexity was within the bound, for good; None: never.
    followed_after: Mapping[str, float | None]
    best: Mapping[str, str]

    def report(self) -> Report:
        """The outcome as a bench's report."""
        return Report({"systems": SYSTEMS, **asdict(self)}, self.targets())

    def targets(self) -> list[Target]:
        """The bound holds when traffic drifts, and what that leaves of the speed."""
        helios = {row.phase: row for row in self.rows if row.system == "HELIOS"}
        full = next(row for row in self.rows if (row.system, row.phase) == ("full", ALL))
        phases = list(self.followed_after)
        later = [self.followed_after[phase] for phase in phases[1:]]
        slowest = max((math.inf if one is None else one for one in later), default=0.0)
        within = min(helios[phase].within_bound for phase in phases)
        ratio = helios[ALL].tokens_per_second / full.tokens_per_second if full.tokens_per_second else 0.0
        return [
            Target(
                "within the perplexity bound after a drift",
                f"at most {_FOLLOW_TARGET:g} s",
                ", ".join(
                    f"{phase} never" if one is None else f"{phase} {one:.1f} s"
                    for phase, one in zip(phases[1:], later, strict=True)
                ),
                slowest <= _FOLLOW_TARGET,
            ),
            Target(
                "tokens from plans within the bound, the worst phase",
                f"at least {_WITHIN_TARGET:.0%}",
                f"{within:.1%}",
                within >= _WITHIN_TARGET,
            ),
            Target(
                "throughput against full, all phases",
                f"at least {_RATIO_TARGET:g}x",
                f"{ratio:.2f}x",
                ratio >= _RATIO_TARGET,
            ),
        ]


SYSTEMS = {
    "full": "the best candidate of each phase, all layers, continuous batching",
    "dynamic": "the same candidate, all layers loaded, each token leaves at its own exit",
    "HELIOS": "model and depth by the controller, which is not told of the phases",
}


class Quality:
    """How good any plan is on held-out text of a phase, from every exit's view on that text."""

    def __init__(
        self, models_dir: Path, tokenizer_id: str, precision: Precision, say: Callable[[str], None]
    ) -> None:
        """Runs every candidate over the texts, computed as the workers do.

        Raises SettingsError when there is none.
        """
        set_threads(1)
        models = catalog.list_models(models_dir)
        movable = [model for model in models if model.tokenizer_id in (None, tokenizer_id)]
        context = min((model.context_tokens for model in movable), default=_HELD_OUT.window_tokens)
        sizes = replace(_HELD_OUT, window_tokens=min(_HELD_OUT.window_tokens, context))
        self._subject = Subject(movable, sizes, available_memory() // 4, say, precision)
        self._plans: dict[tuple[str, int, str], tuple[float, float]] = {}
        for model, domain in itertools.product(self._subject.models, held_out.DOMAINS):
            self._subject.traces(model, domain)

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that all candidates share."""
        return next(iter(self._subject.tokenizers.values()))

    def best(self, phase: Phase) -> catalog.ModelEntry:
        """The candidate that is best at full depth."""
        return self._subject.judge(*phase.domains)

    def of_plan(self, model: str, depth: int, phase: Phase) -> tuple[float, float]:
        """Rise of perplexity over the best candidate at full depth, a share; agreement with its own last
        layer."""
        key = (model, depth, phase.name)
        if key not in self._plans:
            found = self._subject.quality(self._subject.model(model), depth, *phase.domains)
            self._plans[key] = (found.perplexity_increase, found.agreement)
        return self._plans[key]

    def of_dynamic(self, phase: Phase) -> tuple[float, float]:
        """The same of the best candidate when each token leaves at its own exit."""
        model, sizes = self.best(phase), self._subject.sizes
        plan, prefix = self._subject.plan(model), sizes.prompt_tokens
        nats, full_nats, agrees = [], [], []
        for domain in phase.domains:
            texts = [
                window[: prefix + sizes.forced_tokens] for window in self._subject.windows(model, domain)
            ]
            dynamic = trace_dynamic(plan, texts, prefix, plan.thresholds)
            for trace, row in zip(self._subject.traces(model, domain), range(len(texts)), strict=True):
                part = slice(prefix - 1, len(texts[row]) - 1)
                full_nats.append(trace.nats[-1, part])
                agrees.append(dynamic.top_ids[row] == trace.top_ids[-1, part])
            nats.append(dynamic.nats.ravel())
        excess = np.concatenate(nats).mean(dtype=np.float64)
        excess -= np.concatenate(full_nats).mean(dtype=np.float64)
        return math.expm1(float(excess)), float(np.concatenate(agrees).mean())


def run(running: StackState | None, seconds: float, show: Show) -> Outcome:
    """Serves the phases on the running stack, or on one of its own, then on `full` and on `dynamic`.

    `seconds`: of traffic, in all. The running stack's objective and pins are as before afterwards.
    Raises SettingsError when the running stack does not follow traffic by itself, UnavailableError.
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
        workers = asyncio.run(_workers(state.gateway))
        _check(controller, workers)
        any_worker = next(iter(workers.values()))
        quality = Quality(
            Path(state.models_dir),
            any_worker.model.tokenizer_id,
            Precision(any_worker.precision),
            lambda what: show(Progress(f"quality: {what}")),
        )
        traffic = _Traffic(quality.best(PHASES[0]), quality.tokenizer)
        open_ones.enter_context(default_orders(controller))
        show(Progress("waiting for the controller's first decision"))
        decided = _await_decision(controller, after=0)
        # What the stack served before the demo is no drift of the demo's.
        show(Progress(f"not measured yet: {PHASES[0].name} prompts, profiled once"))
        asyncio.run(_lead_in(state, traffic))
        _await_rollout(controller, _await_decision(controller, after=decided.number))
        phase_seconds = seconds * _HELIOS_SHARE / len(PHASES)
        timeline, followed = asyncio.run(_follow(state, traffic, quality, phase_seconds, show))
    slice_seconds = seconds * (1 - _HELIOS_SHARE) / 2 / len(PHASES)
    rows = []
    for mode in ("full", "dynamic"):
        show(Progress(f"{mode}: the same traffic; starting its workers"))
        served = _serve_fixed(mode, state, workers, traffic, quality, slice_seconds, show)
        # `full` is what the others are compared with.
        found = [(0.0, 1.0) if mode == "full" else quality.of_dynamic(phase) for phase in PHASES]
        rows += _rows(
            mode,
            served,
            {
                phase.name: [(_tokens(served[phase.name]), *of_phase)]
                for phase, of_phase in zip(PHASES, found, strict=True)
            },
        )
    rows += _rows(
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
        followed_after={phase.name: _followed_after(phase, timeline) for phase in PHASES},
        best={phase.name: quality.best(phase).name for phase in PHASES},
    )


class _Traffic:
    """Prompts of a phase, in one order for every system."""

    def __init__(self, model: catalog.ModelEntry, tokenizer: Tokenizer) -> None:
        self.prompt_tokens = min(_PROMPT_TOKENS, model.context_tokens // 2)
        self.output_tokens = min(_OUTPUT_TOKENS, model.context_tokens // 4)
        self._documents = {
            domain: [tokenizer.encode(document).ids for document in held_out.documents(domain)]
            for domain in held_out.DOMAINS
        }

    def requests(self, phase: Phase, seconds: float) -> Iterator[Request]:
        """Requests until the time is over."""
        until = time.monotonic() + seconds
        pools = itertools.cycle([self._prompts(domain, PHASES.index(phase)) for domain in phase.domains])
        while time.monotonic() < until:
            yield Request(next(next(pools)), self.output_tokens)

    def _prompts(self, domain: str, first: int) -> Iterator[tuple[int, ...]]:
        """Endless; each time round and in each phase the texts are cut elsewhere, so that no prompt, whose KV
        may be kept, comes twice soon."""
        # Each begins with the text's start token.
        length = self.prompt_tokens - 1
        for round_ in itertools.count(first, len(PHASES)):
            offset = 1 + round_ * 13 % length
            cuts = [
                (ids[0], *ids[start : start + length])
                for ids in self._documents[domain]
                for start in range(offset, len(ids) - length + 1, length)
            ]
            random.Random(round_).shuffle(cuts)
            yield from cuts


def _check(controller: ControllerClient, workers: Mapping[str, worker_pb2.GetStatusResponse]) -> None:
    """Raises SettingsError when the stack would not follow traffic by itself."""
    mode = controller.get_plan().mode
    if mode != "active":
        raise SettingsError(
            f"the running stack's controller is in mode {mode} and changes nothing; start it with "
            "`helios up --controller active`, or stop it: the demo then starts one of its own"
        )
    modes = {status.exit_mode for status in workers.values()}
    if modes != {"greedy"}:
        raise SettingsError(
            f"the running stack's workers exit in mode {', '.join(sorted(modes))}, HELIOS in mode greedy; "
            "start it without --exit-mode, or stop it: the demo then starts one of its own"
        )


@contextlib.contextmanager
def default_orders(controller: ControllerClient) -> Iterator[None]:
    """The default objective and no pins; afterwards what the operator had ordered."""
    before = controller.get_plan()
    held = [one for one in before.plans if one.pinned]
    slo, default = Slo.from_proto(before.slo), Slo()
    try:
        if held:
            controller.unpin("")
        if slo != default:
            controller.set_slo(default.to_proto())
        yield
    finally:
        plans = {(one.model, one.depth) for one in held}
        if len(plans) == 1 and len(held) == len(before.plans):
            controller.pin(held[0].model, held[0].depth, "")
        else:
            for one in held:
                controller.pin(one.model, one.depth, one.worker_id)
        if slo != default:
            controller.set_slo(slo.to_proto())


def _await_decision(controller: ControllerClient, after: int) -> controller_pb2.Decision:
    """The first decision after number `after`. Raises UnavailableError, saying what is amiss."""
    request = controller_pb2.WatchDecisionsRequest()
    call = controller.stub.WatchDecisions(request, timeout=_DECISION_SECONDS)
    try:
        for answer in call:
            if answer.decision.number > after:
                return answer.decision
        raise UnavailableError("the controller ended the record of its decisions; is it running?")
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise error_from(error, controller.target) from error
        amiss = "; ".join(controller.get_plan().problems) or "it does not say why"
        raise UnavailableError(
            f"the controller has not decided within {_DECISION_SECONDS:g} s: {amiss}"
        ) from error
    finally:
        call.cancel()


def _await_rollout(controller: ControllerClient, decision: controller_pb2.Decision) -> None:
    """Returns once the workers serve what was decided, or after a while: the timeline shows it then."""
    chosen = {(one.worker_id, one.model, one.depth) for one in decision.chosen}
    deadline = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < deadline:
        if chosen <= {(one.worker_id, one.model, one.depth) for one in controller.get_plan().plans}:
            return
        time.sleep(_LOOK_SECONDS)


async def _lead_in(state: StackState, traffic: "_Traffic") -> None:
    """Prompts of the first phase, and their evaluation, as `helios profile` asks for it."""
    first = itertools.islice(traffic.requests(PHASES[0], math.inf), 2 * STREAMS)
    async with load.connect(state.gateway) as gateway, load.connect(state.profiler) as profiler:
        await load.run(load.through_gateway(gateway), first, STREAMS)
        stub: profiler_pb2_grpc.ProfilerServiceAsyncStub = profiler_pb2_grpc.ProfilerServiceStub(profiler)
        try:
            async for _ in stub.Evaluate(profiler_pb2.EvaluateRequest(), timeout=_DECISION_SECONDS):
                pass
        except grpc.aio.AioRpcError as error:
            raise error_from(error, state.profiler) from error


async def _workers(gateway: str) -> dict[str, worker_pb2.GetStatusResponse]:
    """The ready workers' own words, by id. Raises UnavailableError when there is none."""
    async with AsyncClient(gateway) as client:
        answer = await client.status(_ANSWER_SECONDS)
    found = {}
    for worker in answer.workers:
        if worker.ready:
            async with load.connect(worker.address) as channel:
                stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
                request = worker_pb2.GetStatusRequest()
                try:
                    found[worker.worker_id] = await stub.GetStatus(request, timeout=_ANSWER_SECONDS)
                except grpc.aio.AioRpcError as error:
                    raise error_from(error, worker.address) from error
    if not found:
        raise UnavailableError("the running stack has no ready worker; see `helios status`")
    return found


async def _follow(
    state: StackState, traffic: _Traffic, quality: Quality, phase_seconds: float, show: Show
) -> tuple[Timeline, dict[str, list[Stream]]]:
    """The phases one after the other; what the stack did, and every stream by phase."""
    async with (
        load.connect(state.gateway) as gateway,
        load.connect(state.controller) as controller,
        AsyncClient(state.gateway) as client,
    ):
        watch = _Watch(client, quality, phase_seconds * len(PHASES), show)
        beside = [
            asyncio.create_task(watch.sample()),
            asyncio.create_task(watch.read_decisions(controller)),
        ]
        streams: dict[str, list[Stream]] = {}
        phases = []
        try:
            for phase in PHASES:
                began = watch.enter(phase)
                requests = traffic.requests(phase, phase_seconds)
                serving = asyncio.create_task(load.run(load.through_gateway(gateway), requests, STREAMS))
                await asyncio.wait({serving, *beside}, return_when=asyncio.FIRST_COMPLETED)
                for task in beside:
                    if task.done():
                        serving.cancel()
                        task.result()
                streams[phase.name] = await serving
                phases.append((phase.name, began, watch.seconds))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
    bound = Slo().max_perplexity_increase
    return Timeline(tuple(phases), tuple(watch.samples), tuple(watch.marks), bound), streams


class _Watch:
    """Samples and decisions since the traffic began."""

    def __init__(self, client: AsyncClient, quality: Quality, total_seconds: float, show: Show) -> None:
        self.samples: list[Sample] = []
        self._client = client
        self._quality = quality
        self._total_seconds = total_seconds
        self._show = show
        self._began = time.time()
        self._phase = PHASES[0]
        self._before: dict[str, worker_pb2.Telemetry] = {}
        self._last: dict[str, WorkerSample] = {}
        self._decisions: dict[int, controller_pb2.Decision] = {}

    @property
    def seconds(self) -> float:
        """Since the traffic began."""
        return time.time() - self._began

    @property
    def marks(self) -> list[Mark]:
        """The decisions so far."""
        marks: list[Mark] = []
        first = self.samples[0].workers[0] if self.samples else None
        before = f"{first.model} at depth {first.depth}" if first else ""
        for number, decision in sorted(self._decisions.items()):
            chosen = sorted({f"{one.model} at depth {one.depth}" for one in decision.chosen})
            plan = ", ".join(chosen)
            seconds = decision.time - self._began
            # One made before the traffic comes again when its outcome is known.
            if seconds >= 0:
                marks.append(Mark(number, seconds, decision.trigger, plan != before, plan, decision.reason))
            before = plan
        return marks

    def enter(self, phase: Phase) -> float:
        """The next phase begins; returns when."""
        self._phase = phase
        return self.seconds

    async def sample(self) -> None:
        """Looks at the workers until cancelled. Raises HeliosError when the gateway is gone."""
        while True:
            status = await self._client.status(_ANSWER_SECONDS)
            self._take(status)
            self._show(
                Progress(
                    f"HELIOS: {self._phase.name} prompts",
                    self.seconds,
                    self._total_seconds,
                    self.samples,
                    self.marks,
                )
            )
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def read_decisions(self, channel: grpc.aio.Channel) -> None:
        """Reads decisions as they are made, until cancelled. Raises UnavailableError without a controller."""
        stub: controller_pb2_grpc.ControllerServiceAsyncStub
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        try:
            async for response in stub.WatchDecisions(controller_pb2.WatchDecisionsRequest(history=0)):
                self._decisions[response.decision.number] = response.decision
        except grpc.aio.AioRpcError as error:
            raise error_from(error, "the controller") from error
        raise UnavailableError("the controller ended the record of its decisions; is it running?")

    def _take(self, status: inference_pb2.GetServingStatusResponse) -> None:
        workers, nats, agreement, weight = [], 0.0, 0.0, 0
        for worker in sorted(status.workers, key=lambda one: one.worker_id):
            now = worker.telemetry
            if not now.model:
                continue
            before, last = self._before.get(worker.worker_id), self._last.get(worker.worker_id)
            done = rates(now, before)
            rate, cbc = done.tokens_per_second, done.cbc
            if before is not None and last is not None and now.time == before.time:
                # It was not heard since the last look: what it did then is the best that is known.
                rate, cbc = last.tokens_per_second, last.cbc
            self._before[worker.worker_id] = now
            sample = WorkerSample(worker.worker_id, now.model, now.depth, done.tokens, rate, cbc)
            self._last[worker.worker_id] = sample
            workers.append(sample)
            # While nothing is generated all plans count the same.
            share = done.tokens or 1
            increase, agrees = self._quality.of_plan(now.model, now.depth, self._phase)
            nats += share * math.log1p(increase)
            agreement += share * agrees
            weight += share
        if weight:
            self.samples.append(
                Sample(
                    self.seconds,
                    self._phase.name,
                    tuple(workers),
                    math.expm1(nats / weight),
                    agreement / weight,
                )
            )


def _serve_fixed(
    mode: str,
    state: StackState,
    workers: Mapping[str, worker_pb2.GetStatusResponse],
    traffic: _Traffic,
    quality: Quality,
    seconds: float,
    show: Show,
) -> dict[str, list[Stream]]:
    """The phases on as many workers that exit in `mode`, each with its best candidate at all layers."""
    any_worker = next(iter(workers.values()))
    options = {
        "--models-dir": state.models_dir,
        "--model": quality.best(PHASES[0]).name,
        "--exit-mode": mode,
        "--workers": str(len(workers)),
        "--threads": str(max(1, any_worker.threads)),
        "--precision": any_worker.precision,
    }
    with local_stack(*itertools.chain.from_iterable(options.items())) as baseline:
        return asyncio.run(_serve_phases(mode, baseline, traffic, quality, seconds, show))


async def _serve_phases(
    mode: str, state: StackState, traffic: _Traffic, quality: Quality, seconds: float, show: Show
) -> dict[str, list[Stream]]:
    served = {}
    total = seconds * len(PHASES)
    async with load.connect(state.gateway) as gateway, AsyncClient(state.gateway) as client:
        through = load.through_gateway(gateway)
        for index, phase in enumerate(PHASES):
            show(Progress(f"{mode}: {phase.name} prompts", index * seconds, total))
            await _reload_all(client, quality.best(phase))
            first = itertools.islice(traffic.requests(phase, seconds), STREAMS)
            await load.run(through, [replace(one, max_tokens=_WARM_UP_TOKENS) for one in first], STREAMS)
            served[phase.name] = await load.run(through, traffic.requests(phase, seconds), STREAMS)
    return served


async def _reload_all(client: AsyncClient, model: catalog.ModelEntry) -> None:
    for worker in (await client.status(_ANSWER_SECONDS)).workers:
        async with load.connect(worker.address) as channel:
            stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
            request = worker_pb2.ReloadRequest(model=model.name, depth=model.num_layers)
            try:
                async for _ in stub.Reload(request, timeout=_RELOAD_SECONDS):
                    pass
            except grpc.aio.AioRpcError as error:
                raise error_from(error, worker.address) from error


def _tokens(streams: Sequence[Stream]) -> int:
    return sum(len(stream.token_ids) for stream in streams)


def _rows(
    system: str, served: Mapping[str, Sequence[Stream]], parts: Mapping[str, Sequence[_Part]]
) -> list[Row]:
    """A row a phase, and one of all."""
    rows = [_row(system, phase, streams, parts[phase]) for phase, streams in served.items()]
    every = [stream for streams in served.values() for stream in streams]
    together = _row(system, ALL, every, [part for of_phase in parts.values() for part in of_phase])
    # Without the time between the phases.
    seconds = math.fsum(row.seconds for row in rows)
    rate = _tokens(every) / seconds if seconds else 0.0
    return [*rows, replace(together, seconds=seconds, tokens_per_second=rate)]


def _row(system: str, phase: str, streams: Sequence[Stream], parts: Sequence[_Part]) -> Row:
    summary = load.summarise(streams)
    tokens = sum(weight for weight, _, _ in parts)
    bound = Slo().max_perplexity_increase or math.inf
    nats = math.fsum(weight * math.log1p(increase) for weight, increase, _ in parts)
    agreement = math.fsum(weight * agreement for weight, _, agreement in parts)
    within = sum(weight for weight, increase, _ in parts if increase <= bound)
    return Row(
        system,
        phase,
        summary.streams,
        summary.failed,
        tuple(dict.fromkeys(stream.error for stream in streams if stream.error)),
        summary.seconds,
        summary.tokens_per_second,
        summary.ttft_ms,
        summary.tpot_ms,
        *(
            (math.expm1(nats / tokens), agreement / tokens, within / tokens)
            if tokens
            else (math.nan, math.nan, math.nan)
        ),
    )


def _followed_after(phase: Phase, timeline: Timeline) -> float | None:
    bound = timeline.perplexity_bound
    began = next(began for name, began, _ in timeline.phases if name == phase.name)
    samples = [sample for sample in timeline.samples if sample.phase == phase.name]
    outside = [
        sample.seconds for sample in samples if bound is not None and sample.perplexity_increase > bound
    ]
    if not outside:
        return 0.0
    later = [sample.seconds for sample in samples if sample.seconds > outside[-1]]
    return later[0] - began if later else None
