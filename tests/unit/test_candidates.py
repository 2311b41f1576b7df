"""The profiler's loaded candidates: kept, dropped for memory, loaded again when their files change."""

import os
import shutil
from pathlib import Path

import pytest

from helios.catalog import read_model
from helios.engine.evaluation.candidate import load_candidate, needed_bytes
from helios.engine.evaluation.settings import EvaluationSettings
from helios.errors import OutOfMemoryError
from services.profiler.candidates import Candidates

SETTINGS = EvaluationSettings(generated_tokens=4, batches=(1,))
PROMPTS = [[2, *range(10, 30)]]
PLENTY = 1 << 40


def test_a_model_is_loaded_once_until_its_files_change(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "tiny", tmp_path / "tiny")
    candidates = Candidates(SETTINGS, PLENTY)
    first, was_loaded = candidates.take(read_model(tmp_path / "tiny"), PROMPTS)
    assert was_loaded
    again, was_loaded = candidates.take(read_model(tmp_path / "tiny"), PROMPTS)
    assert again is first
    assert not was_loaded
    os.utime(tmp_path / "tiny" / "model.safetensors", (1, 1))
    changed, was_loaded = candidates.take(read_model(tmp_path / "tiny"), PROMPTS)
    assert was_loaded
    assert changed.checkpoint != first.checkpoint


def test_the_one_used_longest_ago_goes_when_memory_runs_out(tiny_models: Path) -> None:
    entries = {name: read_model(tiny_models / name) for name in ("tiny", "other", "long")}
    needed = max(needed_bytes(entry, PROMPTS, SETTINGS) for entry in entries.values())
    # Room for the candidate in use and one other.
    weights = max(load_candidate(entry, SETTINGS).model.weight_bytes for entry in entries.values())
    candidates = Candidates(SETTINGS, needed + weights)
    for name in ("tiny", "other", "tiny"):
        candidates.take(entries[name], PROMPTS)
    assert candidates.names == ["other", "tiny"]
    candidates.take(entries["long"], PROMPTS)
    assert candidates.names == ["tiny", "long"]


def test_a_model_beyond_the_budget_is_refused_before_it_is_loaded(tiny_models: Path) -> None:
    candidates = Candidates(SETTINGS, 1000)
    with pytest.raises(OutOfMemoryError, match="the budget is 1,000"):
        candidates.take(read_model(tiny_models / "tiny"), PROMPTS)
    assert candidates.names == []
