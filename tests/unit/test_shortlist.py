"""The shortlist: models that fit, ordered by the objective, and always the most accurate one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helios.architectures.registry import config_of
from helios.catalog import EarlyExitFacts, ModelEntry
from helios.footprint import kv_bytes_per_token, model_bytes
from helios.modes import Precision
from helios.shortlist import offline_bits_per_byte, shortlist
from helios.slo import Objective

PLENTY = 1 << 50


def model(
    name: str, hidden: int, layers: int = 8, first_exit: int = 2, training: Mapping[str, Any] | None = None
) -> ModelEntry:
    fields = {
        "model_type": "opt",
        "vocab_size": 1000,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "ffn_dim": 4 * hidden,
        "max_position_embeddings": 256,
    }
    config = config_of(fields, Path(name) / "config.json")
    exits = tuple(sorted({first_exit, layers}))
    facts = EarlyExitFacts(exits, "shared", layers, training=training or {})
    return ModelEntry(name, Path(name), config, facts, "tokenizer")


SIZES = [model("huge", 512), model("small", 64), model("middle", 128), model("large", 256)]


def names(models: list[ModelEntry], objective: Objective, memory: int = PLENTY, top_k: int = 3) -> list[str]:
    return [entry.name for entry in shortlist(models, objective, memory, Precision.FLOAT32, top_k).candidates]


@pytest.mark.parametrize("objective", [Objective.THROUGHPUT, Objective.LATENCY, Objective.ENERGY])
def test_fast_objectives_take_the_small_first_exits_and_the_most_accurate_model(objective: Objective) -> None:
    assert names(SIZES, objective) == ["small", "middle", "huge"]


def test_accuracy_takes_the_largest() -> None:
    assert names(SIZES, Objective.ACCURACY) == ["huge", "large", "middle"]


def test_a_shallow_exit_makes_a_large_model_fast() -> None:
    models = [model("full-only", 128, first_exit=8), model("exits", 256, layers=8, first_exit=1)]
    assert names(models, Objective.THROUGHPUT)[0] == "exits"


def test_a_model_that_does_not_fit_whole_is_refused_with_the_figures() -> None:
    whole = model_bytes(SIZES[0], Precision.FLOAT32)
    found = shortlist(SIZES, Objective.ACCURACY, whole, Precision.FLOAT32, 2)
    assert [entry.name for entry in found.candidates] == ["large", "middle"]
    assert f"the budget is {whole:,}" in found.refused["huge"]
    assert "objective accuracy" in found.refused["small"]


@pytest.mark.parametrize("precision", [one for one in Precision if one is not Precision.AUTO])
def test_a_model_fits_to_the_byte_with_the_kv_of_one_context(precision: Precision) -> None:
    one = model("one", 64)
    needed = model_bytes(one, precision) + 256 * kv_bytes_per_token(one.config, 8, precision)
    assert shortlist([one], Objective.ENERGY, needed, precision).candidates == (one,)
    assert shortlist([one], Objective.ENERGY, needed - 1, precision).candidates == ()


def test_of_two_as_large_the_one_with_fewer_bits_per_byte_is_the_more_accurate() -> None:
    def evaluated(bits: float) -> dict[str, Any]:
        return {
            "evaluation": {"prose": {"8": {"bits_per_byte": bits}}, "tech": {"8": {"bits_per_byte": 2.0}}}
        }

    models = [
        model("b", 64, training=evaluated(1.5)),
        model("a", 64),
        model("c", 64, training=evaluated(1.0)),
    ]
    assert names(models, Objective.ACCURACY) == ["c", "b", "a"]
    assert offline_bits_per_byte(models[0]) == 1.75


@pytest.mark.parametrize(
    "training", [{}, {"evaluation": []}, {"evaluation": {"prose": {"8": 1}, "tech": None}}]
)
def test_facts_of_another_shape_are_as_good_as_none(training: dict[str, Any]) -> None:
    assert offline_bits_per_byte(model("a", 64, training=training)) is None


def test_no_model_makes_an_empty_shortlist() -> None:
    assert names([], Objective.THROUGHPUT) == []
