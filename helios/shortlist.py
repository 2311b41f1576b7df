"""Which models are worth profiling (TopK in arXiv 2504.10724), by offline facts alone. Free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from helios.catalog import ModelEntry
from helios.footprint import kv_bytes_per_token, model_bytes
from helios.slo import Objective

# The paper's TopK.
TOP_K = 3


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The candidates, best first, and why each of the other models is not among them."""

    candidates: tuple[ModelEntry, ...]
    refused: Mapping[str, str]


def shortlist(
    models: Sequence[ModelEntry],
    objective: Objective,
    memory_bytes: int,
    precision: str,
    top_k: int = TOP_K,
) -> Shortlist:
    """The `top_k` models for an objective that fit into memory whole, with the KV of one context.

    Offline facts are coarse. A model is taken to be as fast and as cheap as its first exit is small, and as
    accurate as it is large. Of two equally large models the one with fewer bits per byte in its training's
    evaluation counts as more accurate. The most accurate model is always among the candidates, since bounds
    on quality are relative to it.

    memory_bytes: the budget for weights and KV. precision: the name of what products are computed in.
    """
    refused = {}
    fitting = []
    for model in models:
        kv_bytes = model.context_tokens * kv_bytes_per_token(model.config, model.num_layers, precision)
        needed = model_bytes(model, precision) + kv_bytes
        if needed <= memory_bytes:
            fitting.append(model)
        else:
            refused[model.name] = f"needs {needed:,} bytes at full depth, the budget is {memory_bytes:,}"
    by_accuracy = sorted(fitting, key=_inaccuracy)
    ordered = by_accuracy
    if objective is not Objective.ACCURACY:
        ordered = sorted(fitting, key=lambda model: model.config.parameters(model.exit_layers[0]))
    chosen = ordered[:top_k]
    if by_accuracy and by_accuracy[0] not in chosen:
        chosen[-1] = by_accuracy[0]
    for model in fitting:
        if model not in chosen:
            refused[model.name] = f"{len(chosen)} others promise more for the objective {objective}"
    return Shortlist(tuple(chosen), refused)


def offline_bits_per_byte(model: ModelEntry) -> float | None:
    """The last layer's mean over all domains of the training evaluation in helios.json; None without one."""
    table = model.facts.training.get("evaluation")
    last = str(model.num_layers)
    domains = list(table.values()) if isinstance(table, dict) else []
    found = [_field(_field(domain, last), "bits_per_byte") for domain in domains]
    known = [float(value) for value in found if isinstance(value, int | float)]
    return fmean(known) if known else None


def _inaccuracy(model: ModelEntry) -> tuple[float, ...]:
    bits = offline_bits_per_byte(model)
    return -model.parameters, float("inf") if bits is None else bits


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
