"""A budget is divided among plans: as much as fits, at least a context for each depth, the rest by share."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helios import catalog
from helios.architectures.spec import ModelConfig
from helios.engine.backends.kv_cache import kv_bytes
from helios.engine.memory import MemoryLimits, MemoryPlan, ServedModel, divide_memory
from helios.errors import OutOfMemoryError
from tests.variants import save_variant

BLOCK_TOKENS, RUNNING = 16, 8
WEIGHTS = 1 << 20
# Depths and their shares, for each model.
SHARES = st.lists(
    st.dictionaries(st.integers(1, 12), st.floats(0.01, 10), min_size=1, max_size=4), min_size=1, max_size=3
)


@pytest.fixture(scope="module", params=["pre-norm", "one-kv-head"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("models") / "random"
    save_variant(path, request.param, 1)
    return catalog.read_model(path).config


def divide(config: ModelConfig, budget: int, shares: Sequence[dict[int, float]]) -> MemoryPlan:
    models = [
        ServedModel(f"model-{number}", config, one, WEIGHTS, torch.float32, torch.float32)
        for number, one in enumerate(shares)
    ]
    return divide_memory(models, MemoryLimits(budget, RUNNING, 64, BLOCK_TOKENS))


@given(budget=st.integers(1 << 18, 64 << 20), shares=SHARES)
def test_a_division_fits_and_leaves_no_room_for_another_block(
    config: ModelConfig, budget: int, shares: list[dict[int, float]]
) -> None:
    layer_bytes = kv_bytes(config.num_kv_heads, config.head_dim, BLOCK_TOKENS, torch.float32)
    context = config.context_tokens // BLOCK_TOKENS
    depths = sorted({depth for one in shares for depth in one})
    try:
        memory = divide(config, budget, shares)
    except OutOfMemoryError as error:
        enough = int(str(error).split("give at least ")[1].split(" ")[0].replace(",", ""))
        assert budget < enough
        assert divide(config, enough, shares).num_blocks == context
        return
    layer_blocks = memory.layer_blocks
    assert len(layer_blocks) == depths[-1]
    assert list(layer_blocks) == sorted(layer_blocks, reverse=True)
    assert context <= layer_blocks[-1] <= layer_blocks[0] <= RUNNING * context
    assert list(memory.blocks) == depths
    used = memory.weight_bytes + memory.activation_bytes + layer_bytes * sum(layer_blocks)
    assert used <= budget
    if layer_blocks[-1] < RUNNING * context:
        assert budget - used < layer_bytes * depths[-1] * len(depths)
    else:
        assert set(layer_blocks) == {RUNNING * context}


@given(budget=st.integers(1 << 21, 64 << 20), depth=st.integers(1, 12))
def test_a_single_plan_has_all_the_memory(config: ModelConfig, budget: int, depth: int) -> None:
    block_bytes = depth * kv_bytes(config.num_kv_heads, config.head_dim, BLOCK_TOKENS, torch.float32)
    try:
        memory = divide(config, budget, [{depth: 3.0}])
    except OutOfMemoryError as error:
        assert f"cannot hold {depth} layers" in str(error)
        return
    left = budget - memory.weight_bytes - memory.activation_bytes
    most = RUNNING * config.context_tokens // BLOCK_TOKENS
    assert memory.num_blocks == min(left // block_bytes, most)
    assert memory.layer_blocks == (memory.num_blocks,) * depth


def test_scarce_blocks_are_divided_by_share(config: ModelConfig) -> None:
    shares = [{2: 3.0, 12: 1.0}]
    plenty = divide(config, 64 << 20, shares)
    layer_bytes = kv_bytes(config.num_kv_heads, config.head_dim, BLOCK_TOKENS, torch.float32)
    kv = layer_bytes * sum(plenty.layer_blocks)
    memory = divide(config, plenty.weight_bytes + plenty.activation_bytes + kv // 3, shares)
    only_shallow = memory.blocks[2] - memory.blocks[12]
    assert only_shallow / memory.blocks[12] == pytest.approx(3, rel=0.05)
