"""An engine may serve a smaller context than its model has positions for. Everything follows it."""

import re
from pathlib import Path

import pytest
import torch

from helios.catalog import read_model
from helios.engine import Engine, EngineSettings, SamplingParams
from helios.engine.weights import loader
from helios.errors import InvalidRequestError, OutOfMemoryError, SettingsError
from helios.modes import Precision
from helios.shortlist import shortlist
from helios.slo import Objective
from tests.variants import save_variant

LIMIT = 40
SAMPLING = SamplingParams(max_tokens=100, ignore_eos=True)


@pytest.mark.parametrize("variant", ["pre-norm", "llama"])
def test_a_smaller_context_gives_the_same_tokens_and_ends_at_its_limit(tmp_path: Path, variant: str) -> None:
    reference = save_variant(tmp_path, variant, 1)
    engine = Engine.load(tmp_path, settings=EngineSettings(memory_bytes=64 << 20, context_tokens=LIMIT))
    prompt = list(range(2, 22))
    ids = [token.token_id for token in engine.generate(prompt, SAMPLING)]
    assert len(ids) == LIMIT - len(prompt)
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :]
    assert ids == logits.argmax(-1).tolist()
    assert engine.served.context_tokens == LIMIT
    with pytest.raises(InvalidRequestError, match=r"40 tokens; .* a context of 40"):
        engine.submit("long", list(range(LIMIT)), SAMPLING, [].append)


def test_the_table_of_rotations_and_the_pool_are_as_large_as_the_context(tmp_path: Path) -> None:
    save_variant(tmp_path, "llama", 1)
    sizes = {}
    for limit in (LIMIT, 256, None, 10_000):
        settings = EngineSettings(memory_bytes=64 << 20, max_running=1, context_tokens=limit)
        plan = Engine.load(tmp_path, settings=settings).plan
        table = plan.model.weights.ends.rotation
        assert table is not None
        sizes[limit] = len(table), plan.memory.num_blocks
    assert sizes == {LIMIT: (40, 3), 256: (256, 16), None: (256, 16), 10_000: (256, 16)}


@pytest.mark.parametrize("variant", ["pre-norm", "llama"])
def test_without_memory_for_the_full_context_the_error_names_one_that_fits(
    tmp_path: Path, variant: str
) -> None:
    save_variant(tmp_path, variant, 1)
    whole = Engine.load(tmp_path, settings=EngineSettings(memory_bytes=64 << 20, max_running=1)).plan.memory
    budget = whole.weight_bytes + whole.activation_bytes + 100 * whole.kv_bytes_per_token
    with pytest.raises(OutOfMemoryError, match="one full context, 256 tokens") as caught:
        Engine.load(tmp_path, settings=EngineSettings(memory_bytes=budget, max_running=1))
    found = re.search(r"set context_tokens to at most (\d+)", str(caught.value))
    assert found is not None
    settings = EngineSettings(memory_bytes=budget, max_running=1, context_tokens=int(found[1]))
    assert settings.context_tokens == 96
    assert Engine.load(tmp_path, settings=settings).served.context_tokens == 96


def test_packed_weights_serve_every_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MIN_CACHED_BYTES", 0)
    save_variant(tmp_path / "model", "llama", 1)
    for limit, rows in ((LIMIT, LIMIT), (None, 256)):
        settings = EngineSettings(
            memory_bytes=64 << 20, context_tokens=limit, packed_cache_dir=tmp_path / "packed"
        )
        table = Engine.load(tmp_path / "model", settings=settings).plan.model.weights.ends.rotation
        assert table is not None
        assert len(table) == rows
    assert len(list((tmp_path / "packed").iterdir())) == 1


def test_the_shortlist_counts_the_memory_of_the_context_that_is_served(tmp_path: Path) -> None:
    save_variant(tmp_path, "llama", 1)
    entry = read_model(tmp_path)
    settings = EngineSettings(memory_bytes=64 << 20, context_tokens=LIMIT)
    memory = Engine.load(tmp_path, settings=settings).plan.memory
    budget = memory.weight_bytes + 100 * memory.kv_bytes_per_token

    def candidates(limit: int | None) -> int:
        models = [entry.within(limit)]
        return len(shortlist(models, Objective.LATENCY, budget, Precision.FLOAT32).candidates)

    assert (candidates(None), candidates(LIMIT)) == (0, 1)


def test_a_context_without_room_for_an_output_is_refused() -> None:
    with pytest.raises(SettingsError, match="context_tokens must be at least 2"):
        EngineSettings(context_tokens=1)
