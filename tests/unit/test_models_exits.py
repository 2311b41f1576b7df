"""The exits in models/exits, which ship without their models."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helios.catalog import EXITS_FILE, FACTS_FILE, EarlyExitFacts

FOLDERS = sorted((Path(__file__).parents[2] / "models/exits").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shipped_exits_are_complete_and_their_card_has_their_figures(folder: Path) -> None:
    layers = json.loads((folder / FACTS_FILE).read_text())["exit_layers"]
    facts = EarlyExitFacts.read(folder, layers[-1])
    assert facts.weights_digest is not None
    assert len(facts.weights_digest) == 64
    assert facts.tokenizer_id is not None
    assert set(facts.thresholds) == set(layers)
    tensors = load_file(folder / EXITS_FILE)
    parts = {"norm": ("norm.weight",), "linear": ("norm.weight", "linear.weight")}[facts.exit_head]
    assert set(tensors) == {f"exits.{layer}.{part}" for layer in layers[:-1] for part in parts}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    card = (folder / "README.md").read_text()
    for layer, found in facts.training["own_evaluation"].items():
        assert f"| {layer} | {found['perplexity']:.2f} |" in card


def test_there_are_exits_for_a_model_that_a_package_carries() -> None:
    assert "smollm2-135m-instruct" in [folder.name for folder in FOLDERS]
