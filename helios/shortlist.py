"""Selects the models worth profiling (TopK in arXiv 2504.10724) from offline facts. Does not import torch."""

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
    """The candidates, best first, and for each other model the reason why it is not among them."""

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

    Offline facts are coarse. The smaller a model's first exit, the faster and cheaper the model is assumed to
    be. The larger a model, the more accurate it is assumed to be. Of two equally large models the one with
    fewer bits per byte in its training evaluation counts as more accurate. The most accurate model is always
    a candidate, because bounds on quality are relative to it.

    memory_bytes: budget for weights and KV. precision: name of the precision of products.
    """
    refused = {}
    fitting = []
    for model in models:
        kv_bytes = model.context_tokens * kv_bytes_per_token(model.config, model.num_layers, precision)
        needed = model_bytes(model, precision) + kv_bytes
        if needed <= memory_bytes:
            fitting.append(model)
        else:
            refused[model.name] = (
                f"needs {needed:,} bytes at full depth with one context of {model.context_tokens:,} tokens, "
                f"the budget is {memory_bytes:,}"
            )
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
    """The last layer's mean over all domains of the training evaluation in helios.json, if there is one."""
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
