"""Runs the policy on one engine: it evaluates, decides and reloads while requests are in flight."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.load import decode
from bench.paper.policy.profiling import evaluation_settings
from bench.paper.policy.simulation import POOLED_REQUESTS
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.calibration import TARGET_AGREEMENT
from helios.drift import pooled
from helios.engine import Engine
from helios.engine.evaluation.candidate import Candidate
from helios.engine.evaluation.evaluate import evaluate
from helios.history import ModelProfile
from helios.served import ServedPlan
from helios.slo import Slo
from services.controller.agenda import AgendaSettings
from services.controller.policy.decide import decide
from services.controller.situation import Situation, Trigger, WorkerView


def serve(
    subject: Subject, loaded: Sequence[Candidate], profiles: Mapping[str, ModelProfile]
) -> dict[str, Any]:
    """Serves requests on one engine. At regular intervals it evaluates, decides and reloads."""
    subject.say("the policy on an engine that reloads")
    sizes = subject.sizes
    candidates = [one.entry for one in loaded]
    per_phase = sizes.served_requests // 3
    domains = tuple(held_out.DOMAINS)
    prompts = [
        prompt
        for kinds in (*((domain,) for domain in domains), domains)
        for prompt in subject.prompts(candidates[0], kinds, per_phase)
    ]
    settings = AgendaSettings.model_validate(
        {"reassess_requests": sizes.served_interval, "min_dwell_requests": 0}
    )
    evaluation = evaluation_settings(subject)
    history: dict[str, ModelProfile] = {}
    engine = subject.engine(candidates[0])
    plan = ServedPlan(model=candidates[0].name, depth=candidates[0].num_layers)
    events: list[dict[str, Any]] = []
    assessed = 0

    def reassess() -> None:
        nonlocal plan, assessed
        finished = engine.telemetry().counters.finished_sequences
        if finished < assessed + sizes.served_interval:
            return
        assessed = finished
        began = time.perf_counter()
        recent = prompts[max(0, finished - sizes.profiled_requests) : finished]
        for one in loaded:
            name = one.entry.name
            now = evaluate(one, recent, evaluation, timed=profiles[name])
            history[name] = pooled(history.get(name), now, POOLED_REQUESTS, TARGET_AGREEMENT)
        decision = decide(
            _situation(engine, plan, history, sizes.prompt_tokens, sizes.output_tokens), settings
        )
        event: dict[str, Any] = {
            "finished_requests": finished,
            "deciding_seconds": time.perf_counter() - began,
            "plan": str(decision.plan),
            "reason": decision.reason,
        }
        if decision.plan is not None and decision.plan != plan:
            reloaded = engine.reload(subject.model(decision.plan.model).path, decision.plan.depth)
            event["reload"] = {
                "sequences_moved": reloaded.sequences_moved,
                "bytes_read": reloaded.bytes_read,
                "stall_seconds": reloaded.stall_seconds,
            }
            plan = decision.plan
        events.append(event)

    # Lengths differ, so that some requests are in flight at each reload.
    lengths = [max(1, sizes.output_tokens * (1 + index % 4) // 4) for index in range(len(prompts))]
    run = decode.run(engine, prompts, lengths, sizes.largest_batch, reassess)
    return {
        "requests": len(prompts),
        "tokens": run.tokens,
        "tokens_expected": sum(lengths),
        "tokens_per_second": run.tokens_per_second,
        "reassess_requests": sizes.served_interval,
        "events": events,
    }


def _situation(
    engine: Engine,
    plan: ServedPlan,
    history: Mapping[str, ModelProfile],
    prompt_tokens: int,
    output_tokens: int,
) -> Situation:
    """The situation for the policy. The engine is its only worker."""
    telemetry = engine.telemetry()
    worker = WorkerView(
        worker_id="engine",
        model=plan.model,
        depth=plan.depth,
        tokenizer_id=engine.plan.tokenizer_id,
        running=telemetry.running,
        waiting=telemetry.waiting,
        tokens_in_flight=telemetry.running * (prompt_tokens + output_tokens // 2),
        max_running=engine.settings.max_running,
    )
    return Situation(
        trigger=Trigger.REASSESSMENT,
        slo=Slo(),
        history=history,
        candidates=tuple(history),
        workers=(worker,),
        plan=plan,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
