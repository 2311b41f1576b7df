"""Measures a plan for each request on real services: gateway, two workers, controller and profiler.

Two stacks take turns, so that other work on the machine slows both alike. Both serve the same prompts, and no
round repeats a prompt of an earlier one. What routers learn from first comes from other documents.
"""

import asyncio
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from bench.load import clients
from bench.load.clients import Request, Stream
from bench.load.latency import latency
from bench.load.traffic import Phase, Traffic
from bench.paper.control import first_decision
from bench.quality.judge import Judge, stride
from bench.quality.served import best_of, rise, served_of
from bench.results import Target
from bench.systems.bench_stack import bench_stack
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.client import AsyncClient
from helios.controller_client import connect
from helios.served import ServedPlan
from helios.slo import Slo
from helios.stack_state import StackState

_MIX_TARGET, _DOMAIN_TARGET, _TTFT_TARGET = 1.35, 0.98, 0.10
_WORKERS = 2
_ANSWER_SECONDS = 10.0
_LEARNT, _MEASURED = (1, 3, 5), (0, 2, 4)
# Requests that are judged of a stack, and prompts that tell which fixed plan is the best.
_JUDGED_REQUESTS, _KNOWN_PROMPTS = 400, 100
_TTFT_PROMPT_TOKENS, _TTFT_OUTPUT_TOKENS = 256, 4


def measure(subject: Subject) -> dict[str, Any]:
    """A router against a single plan on the mix, against the best fixed plan on each domain, and its TTFT."""
    models = [one for one in subject.models if one.tokenizer_id == subject.models[0].tokenizer_id]
    first, context_tokens = models[0], min(model.context_tokens for model in models)
    assert first.tokenizer_id is not None
    judge = Judge(first.path.parent, first.tokenizer_id, subject.precision, subject.say)
    traffic = Traffic(context_tokens, judge.tokenizer)
    long_traffic = Traffic(context_tokens, judge.tokenizer, _TTFT_PROMPT_TOKENS)
    return {
        "streams": subject.sizes.routed_streams,
        "workers": _WORKERS,
        "prompt_tokens": traffic.prompt_tokens,
        "output_tokens": traffic.output_tokens,
        "mix": _mix(subject, judge, traffic),
        "domains": {
            domain: _domain(subject, judge, traffic, long_traffic, domain) for domain in held_out.DOMAINS
        },
    }


def targets(result: dict[str, Any]) -> list[Target]:
    """The targets for throughput, perplexity and the time to the first token."""
    mix, domains = result["mix"], result["domains"]
    router, single = (mix[name]["rise"]["increase"] for name in ("router", "single"))
    first = next(iter(domains.values()))["ttft"]
    slowest = max(found["ttft"]["ratio"] for found in domains.values())
    return [
        Target(
            "served, mix, saturated: a plan for each request against a single plan, perplexity no worse, or "
            "within the bound",
            f"at least {_MIX_TARGET:g}x",
            f"{mix['ratio']:.2f}x, perplexity {router:+.1%} against {single:+.1%}",
            mix["ratio"] >= _MIX_TARGET and router <= max(single, mix["bound"]),
        ),
        *(
            Target(
                f"served, {domain} alone: a plan for each request against the best fixed plan",
                f"at least {_DOMAIN_TARGET:g}x",
                f"{found['ratio']:.2f}x",
                found["ratio"] >= _DOMAIN_TARGET,
            )
            for domain, found in domains.items()
        ),
        Target(
            f"TTFT, one stream, prompts of {first['prompt_tokens']} tokens, against the same plan pinned",
            f"at most {_TTFT_TARGET:+.0%}",
            ", ".join(f"{domain} {found['ttft']['ratio'] - 1:+.1%}" for domain, found in domains.items()),
            slowest <= 1 + _TTFT_TARGET,
        ),
    ]


def _mix(subject: Subject, judge: Judge, traffic: Traffic) -> dict[str, Any]:
    """A router against a single plan, which the controller chooses too."""
    with _stack(subject) as routed, _stack(subject, routing="single") as single:
        stacks = {"router": routed, "single": single}
        return _compare(subject, judge, traffic, stacks, tuple(held_out.DOMAINS))


def _domain(
    subject: Subject, judge: Judge, traffic: Traffic, long_traffic: Traffic, domain: str
) -> dict[str, Any]:
    """A router against the fastest plan that is within the bound on this domain, and its TTFT."""
    measured = Phase("measured", (domain,), _MEASURED)
    plan = judge.fastest_within(traffic.prompts(measured, _KNOWN_PROMPTS), _bound())
    one_by_one = [
        Request(prompt, _TTFT_OUTPUT_TOKENS)
        for prompt in long_traffic.prompts(measured, subject.sizes.ttft_requests)
    ]
    with _stack(subject) as routed, _stack(subject) as fixed:
        with connect(fixed.controller) as controller:
            controller.pin(plan.model, plan.depth, "")
        found = _compare(subject, judge, traffic, {"router": routed, "fixed": fixed}, (domain,))
        ttft = _ttft(subject, one_by_one, routed, fixed, domain)
    return {**found, "fixed_plan": plan.model_dump(), "ttft": ttft}


def _compare(
    subject: Subject,
    judge: Judge,
    traffic: Traffic,
    stacks: Mapping[str, StackState],
    domains: tuple[str, ...],
) -> dict[str, Any]:
    """Throughput and perplexity of stacks that take turns. The ratio is that of the first to the second."""
    sizes = subject.sizes
    subject.say(f"{' and '.join(domains)}: not measured yet")
    learnt = Phase("learnt", domains, _LEARNT)
    count = _learn(subject, stacks["router"], traffic.requests(learnt))
    for name, stack in stacks.items():
        if name != "router":
            _serve(stack, itertools.islice(traffic.requests(learnt), count), sizes.routed_streams)
    requests = traffic.requests(Phase("measured", domains, _MEASURED))
    rates: dict[str, list[float]] = {name: [] for name in stacks}
    streams: dict[str, list[Stream]] = {name: [] for name in stacks}
    for index in range(sizes.rounds):
        of_round = list(itertools.islice(requests, sizes.routed_requests))
        names = list(stacks)
        for name in names if index % 2 == 0 else reversed(names):
            subject.say(f"{name}, {' and '.join(domains)}: round {index + 1} of {sizes.rounds}")
            served = _serve(stacks[name], of_round, sizes.routed_streams)
            rates[name].append(clients.summarise(served).tokens_per_second)
            streams[name] += served
    every = stride(sizes.rounds * sizes.routed_requests, _JUDGED_REQUESTS, len(domains))
    served_by = {name: judge.of(found, every) for name, found in streams.items()}
    reference = best_of(itertools.chain.from_iterable(served_by.values()))
    base, other = rates.values()
    return {
        **{
            name: {
                "tokens_per_second": statistics.median(rates[name]),
                "rates": rates[name],
                "rise": asdict(rise(served_by[name], reference)),
                "plans": _plans(streams[name]),
                "ttft_ms": asdict(clients.summarise(streams[name]).ttft_ms),
                "tpot_ms": asdict(clients.summarise(streams[name]).tpot_ms),
            }
            for name in stacks
        },
        "ratio": statistics.median(one / two for one, two in zip(base, other, strict=True)),
        "learnt_requests": count,
        "best_candidate": judge.candidates[reference].name,
        "bound": _bound(),
    }


def _ttft(
    subject: Subject, requests: Sequence[Request], routed: StackState, fixed: StackState, domain: str
) -> dict[str, Any]:
    """One stream at a time: the router against the plan that it takes most often, pinned on `fixed`."""
    subject.say(f"time to the first token, {domain}")
    by_router = _serve(routed, requests, 1)
    chosen = Counter(_plan(one) for one in by_router).most_common(1)[0][0]
    of_plan = [one for one in by_router if _plan(one) == chosen]
    with connect(fixed.controller) as controller:
        controller.pin(chosen.model, chosen.depth, "")
    pinned = _serve(fixed, [one.request for one in of_plan], 1)
    routed_seconds, fixed_seconds = ([one.ttft for one in streams] for streams in (of_plan, pinned))
    return {
        "prompt_tokens": len(requests[0].prompt_ids),
        "plan": chosen.model_dump(),
        "requests": len(of_plan),
        "router_ms": asdict(latency(routed_seconds)),
        "fixed_ms": asdict(latency(fixed_seconds)),
        "ratio": statistics.median(routed_seconds) / statistics.median(fixed_seconds),
    }


@contextmanager
def _stack(subject: Subject, routing: str = "request") -> Iterator[StackState]:
    """A stack with controller and profiler, which has decided for the first time."""
    options = {
        "--models-dir": str(subject.models[0].path.parent),
        "--precision": subject.precision.value,
        "--workers": str(_WORKERS),
        "--controller": "active",
    }
    subject.say("starting a stack")
    with bench_stack(
        *itertools.chain.from_iterable(options.items()),
        "--profiler",
        settings={"HELIOS_CONTROLLER_ROUTING": routing},
    ) as state:
        asyncio.run(first_decision(state))
        yield state


def _serve(stack: StackState, requests: Iterable[Request], streams: int) -> list[Stream]:
    """Raises AssertionError when a stream fails, because the throughput would then be wrong."""

    async def serve() -> list[Stream]:
        async with clients.connect(stack.gateway) as channel:
            return await clients.run(clients.through_gateway(channel), requests, streams)

    found = asyncio.run(serve())
    failed = [stream.error for stream in found if stream.error]
    assert not failed, failed[0]
    return found


def _learn(subject: Subject, stack: StackState, requests: Iterator[Request]) -> int:
    """Serves requests until every worker has a router, for a limited time. Returns their number."""
    sizes, count = subject.sizes, 0
    deadline = time.monotonic() + sizes.learning_seconds
    while True:
        count += len(_serve(stack, itertools.islice(requests, sizes.routed_learning), sizes.routed_streams))
        if asyncio.run(_has_router(stack)) or time.monotonic() > deadline:
            return count


async def _has_router(stack: StackState) -> bool:
    async with AsyncClient(stack.gateway) as client:
        status = await client.status(_ANSWER_SECONDS)
    return all(worker.telemetry.router_number for worker in status.workers)


def _plan(stream: Stream) -> ServedPlan:
    """The plan that served a stream, most of it if it was moved."""
    tokens = served_of(stream).tokens
    return max(tokens, key=lambda plan: tokens[plan])


def _plans(streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """How many tokens each plan generated, the most first."""
    tokens = Counter[tuple[str, int]]()
    for stream in streams:
        tokens.update(stream.exits)
    return [
        {"model": model, "depth": depth, "tokens": count} for (model, depth), count in tokens.most_common()
    ]


def _bound() -> float:
    bound = Slo().max_perplexity_increase
    assert bound is not None
    return bound
