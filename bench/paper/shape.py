"""Speed and memory of OPT-1.3B's shape by depth. The weights are random, so quality is not measured."""

from dataclasses import replace
from functools import partial
from typing import Any

from bench.load import decode
from bench.results import Target
from bench.systems.random_model import random_model
from bench.systems.subject import Subject
from helios import catalog
from helios.catalog import ModelEntry
from helios.engine import Engine, ExitMode
from helios.engine.weights.precision import checkpoint_dtype
from helios.modes import Precision

# Memory of an engine beside weights: activations, KV of one full context and of the short sequences here.
_ROOM_BYTES = 2 << 30
_SATURATED = 10.0


def measure(subject: Subject) -> dict[str, Any]:
    """Time per token, tokens per second and bytes of each early exit, in turns with all layers."""
    sizes = subject.sizes
    subject.say(f"the checkpoint of {sizes.shape} with random weights")
    model = catalog.read_model(random_model(sizes.shape, subject.cache_dir / "bench-models"))
    full = _engine(subject, model, model.num_layers)
    rows = []
    for depth in model.exit_layers:
        subject.say(f"speed of {sizes.shape} at depth {depth}")
        engine = full if depth == model.num_layers else _engine(subject, model, depth)
        rows.append(_row(subject, engine, full))
    return {
        "shape": sizes.shape,
        "weights": "random: where tokens would leave, and how good they are, is not known",
        "precision": full.plan.model.precision,
        "num_layers": model.num_layers,
        "prompt_tokens": sizes.prompt_tokens,
        "output_tokens": sizes.shape_tokens,
        "batches": list(sizes.shape_batches),
        "exits": rows,
    }


def targets(result: dict[str, Any]) -> list[Target]:
    """Target: many streams against one stream at the same depth, the best that `dynamic` can do at batch 1.

    Really `dynamic` is slower: it also reads earlier exits and computes the KV of skipped layers.
    """
    measured = []
    for row in result["exits"]:
        if row["depth"] < result["num_layers"]:
            one, *_, most = row["speed"]
            factor = most["decode_tokens_per_second"] / one["decode_tokens_per_second"]
            measured.append((factor, f"{factor:.1f}x at depth {row['depth']}"))
    return [
        Target(
            f"decoding of {result['shape']}'s shape, {result['batches'][-1]} streams, against dynamic "
            "batch 1 whose tokens leave at the same layer (its reading of exits left out)",
            f"at least {_SATURATED:g}x",
            "; ".join(said for _, said in measured),
            all(factor >= _SATURATED for factor, _ in measured),
        )
    ]


def _engine(subject: Subject, model: ModelEntry, depth: int) -> Engine:
    settings = subject.settings(ExitMode.GREEDY, subject.sizes.shape_batches[-1])
    dtype, config = checkpoint_dtype(subject.precision), model.config
    itemsize = 1 if subject.precision is Precision.INT8 else dtype.itemsize
    # Embeddings are stored in the type of the activations.
    weights = config.parameters(depth) * itemsize + config.vocab_size * config.embed_size * dtype.itemsize
    return subject.engine(model, depth, replace(settings, memory_bytes=weights + _ROOM_BYTES))


def _row(subject: Subject, engine: Engine, full: Engine) -> dict[str, Any]:
    sizes, memory = subject.sizes, engine.plan.memory
    speed = []
    for batch in sizes.shape_batches:
        # The tokens do not matter, but no two prompts may be the same.
        starts = range(1, 1 + batch * sizes.prompt_tokens, sizes.prompt_tokens)
        prompts = [list(range(start, start + sizes.prompt_tokens)) for start in starts]
        measures = {
            str(one.plan.depth): partial(decode.run, one, prompts, sizes.shape_tokens, batch)
            for one in (engine, full)
        }
        runs = decode.alternate(measures, sizes.rounds)
        own, base = runs[str(engine.plan.depth)], runs[str(full.plan.depth)]
        run = decode.median_run(own)
        speed.append(
            {
                "batch": batch,
                "decode_tokens_per_second": run.decode_tokens_per_second,
                "tpot_ms": run.tpot_ms.p50,
                "tpot_to_full": decode.ratio(own, base, lambda one: one.tpot_ms.p50),
                "ratio_to_full": decode.ratio(own, base, lambda one: one.decode_tokens_per_second),
            }
        )
    return {
        "depth": engine.plan.depth,
        "weight_bytes": memory.weight_bytes,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "speed": speed,
    }
