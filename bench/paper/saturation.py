"""Throughput by batch, model and depth. The paper does not measure this joint curve."""

from typing import Any

from bench.load import decode
from bench.results import Target
from bench.systems.subject import Subject
from bench.texts import held_out
from helios.engine import ExitMode

# A batch saturates a plan when it reaches this share of the plan's best throughput.
_SATURATED = 0.9


def measure(subject: Subject) -> dict[str, Any]:
    """Decode throughput at every depth and batch, and the batch that each plan's memory allows."""
    sizes = subject.sizes
    largest = sizes.grid_batches[-1]
    output_tokens = max(2, sizes.output_tokens // 2)
    points, plans = [], []
    for model in subject.models:
        for depth in model.exit_layers:
            subject.say(f"saturation of {model.name} at depth {depth}")
            engine = subject.engine(model, depth, subject.settings(ExitMode.GREEDY, largest))
            rates = {}
            for batch in sizes.grid_batches:
                prompts = subject.prompts(model, tuple(held_out.DOMAINS), batch)
                run = decode.run(engine, prompts, output_tokens, batch)
                rates[batch] = run.decode_tokens_per_second
                points.append(
                    {
                        "model": model.name,
                        "depth": depth,
                        "batch": batch,
                        "decode_tokens_per_second": run.decode_tokens_per_second,
                        "tpot_ms": run.tpot_ms.p50,
                    }
                )
            memory = engine.plan.memory
            tokens = sizes.prompt_tokens + output_tokens
            blocks = -(-tokens // engine.settings.block_tokens)
            best = max(rates.values())
            plans.append(
                {
                    "model": model.name,
                    "depth": depth,
                    "best_tokens_per_second": best,
                    "saturating_batch": min(batch for batch in rates if rates[batch] >= _SATURATED * best),
                    "weight_bytes": memory.weight_bytes,
                    "batch_in_memory": memory.num_blocks // blocks,
                    # The engine's pool holds at most max_running contexts.
                    "limited_by": "memory"
                    if memory.num_blocks < largest * -(-model.context_tokens // engine.settings.block_tokens)
                    else "max_running",
                }
            )
    return {
        "prompt_tokens": sizes.prompt_tokens,
        "output_tokens": output_tokens,
        "memory_bytes": subject.memory_bytes,
        "saturated_share": _SATURATED,
        "points": points,
        "plans": plans,
    }


def targets(_result: dict[str, Any]) -> list[Target]:
    """None. The curve explains figures for which other sections have targets."""
    return []
