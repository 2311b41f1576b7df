"""The whole curve: the speed, memory and quality of every exit of every model."""

import math
from dataclasses import asdict
from functools import partial
from typing import Any

from bench.load import decode
from bench.load.decode import Run
from bench.results import Target
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.catalog import ModelEntry
from helios.engine import Engine

_BOUND, _SAVED = 0.05, 0.45


def measure(subject: Subject) -> dict[str, Any]:
    """For each exit: speed relative to the full model in the same run, memory, and quality on each domain."""
    rows = []
    for model in subject.models:
        full = subject.engine(model)
        for depth in model.exit_layers:
            subject.say(f"speed of {model.name} at depth {depth}")
            engine = full if depth == model.num_layers else subject.engine(model, depth)
            rows.append(_row(subject, model, depth, engine, full))
    judges = {}
    for domain in held_out.DOMAINS:
        judge = subject.judge(domain)
        judges[domain] = {"model": judge.name, "depth": judge.num_layers}
    return {
        "prompt_tokens": subject.sizes.prompt_tokens,
        "output_tokens": subject.sizes.output_tokens,
        "rounds": subject.sizes.rounds,
        "batches": list(subject.sizes.batches),
        "best_candidates": judges,
        "exits": rows,
    }


def targets(result: dict[str, Any]) -> list[Target]:
    """Target: TPOT at batch 1 of the smallest plan within +5 %, against all layers, on the worst domain."""
    savings = []
    for domain, judge in result["best_candidates"].items():
        full = next(
            row for row in result["exits"] if (row["model"], row["depth"]) == (judge["model"], judge["depth"])
        )
        within = [row for row in result["exits"] if row["quality"][domain]["perplexity_increase"] <= _BOUND]
        chosen = min(within, key=lambda row: row["weight_bytes"])
        # A plan alternated with its own full depth. If another model is the best, the ratio is to that one.
        to_full = chosen["tpot_ms_batch_1"] / full["tpot_ms_batch_1"]
        saved = 1 - (chosen["tpot_to_full"] if chosen["model"] == full["model"] else to_full)
        savings.append((saved, f"{-saved:+.0%} on {domain} ({chosen['model']} at depth {chosen['depth']})"))
    return [
        Target(
            f"TPOT at batch 1 against full, perplexity within {_BOUND:+.0%}",
            f"{-_SAVED:.0%} or better",
            "; ".join(said for _, said in savings),
            all(saved >= _SAVED for saved, _ in savings),
        )
    ]


def _row(subject: Subject, model: ModelEntry, depth: int, engine: Engine, full: Engine) -> dict[str, Any]:
    sizes = subject.sizes
    speed = []
    tpot_ms = tpot_to_full = math.nan
    for batch in sizes.batches:
        prompts = subject.prompts(model, tuple(held_out.DOMAINS), batch)
        measures = {"at_depth": partial(decode.run, engine, prompts, sizes.output_tokens, batch)}
        if engine is not full:
            measures["full"] = partial(decode.run, full, prompts, sizes.output_tokens, batch)
        runs = decode.alternate(measures, sizes.rounds)
        base = runs.get("full", runs["at_depth"])
        if batch == sizes.batches[0]:
            tpot_ms = decode.median_run(runs["at_depth"]).tpot_ms.p50
            tpot_to_full = decode.ratio(runs["at_depth"], base, lambda one: one.tpot_ms.p50)
        speed.append(
            {
                "batch": batch,
                "decode_tokens_per_second": decode.median_run(runs["at_depth"]).decode_tokens_per_second,
                "full_decode_tokens_per_second": decode.median_run(base).decode_tokens_per_second,
                "ratio_to_full": decode.ratio(
                    runs["at_depth"], base, lambda one: one.decode_tokens_per_second
                ),
                "ratio_to_full_by_cpu_time": decode.ratio(
                    runs["at_depth"], base, lambda one: one.tokens_per_cpu_second
                ),
            }
        )
    quality = {}
    for domain in held_out.DOMAINS:
        judged = _judged(subject, model, domain, engine)
        quality[domain] = asdict(subject.quality(model, depth, domain)) | judged
    return {
        "model": model.name,
        "depth": depth,
        "num_layers": model.num_layers,
        "weight_bytes": engine.plan.memory.weight_bytes,
        "kv_bytes_per_token": engine.plan.memory.kv_bytes_per_token,
        "tpot_ms_batch_1": tpot_ms,
        "tpot_to_full": tpot_to_full,
        "speed": speed,
        "quality": quality,
    }


def _judged(subject: Subject, model: ModelEntry, domain: str, engine: Engine) -> dict[str, float | None]:
    """The best candidate's perplexity on the text that this plan generates. None: their tokenizers differ."""
    judge = subject.judge(domain)
    if judge.tokenizer_id != model.tokenizer_id:
        return {"generated_perplexity": None}
    served = _serve_prompts(subject, model, domain, engine)
    prompts = subject.prompts(model, (domain,), subject.sizes.judged_requests)
    texts = [[*prompt, *ids] for prompt, ids in zip(prompts, served.token_ids, strict=True)]
    nats = subject.text_nats(judge, texts, subject.sizes.prompt_tokens)
    return {"generated_perplexity": math.exp(nats)}


def _serve_prompts(subject: Subject, model: ModelEntry, domain: str, engine: Engine) -> Run:
    """Greedy continuations of a domain's prompts."""
    sizes = subject.sizes
    prompts = subject.prompts(model, (domain,), sizes.judged_requests)
    return decode.run(engine, prompts, sizes.output_tokens, sizes.largest_batch)
