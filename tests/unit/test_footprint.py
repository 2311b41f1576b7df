"""The bytes that are computed from a config are those that loading takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helios.architectures.spec import ModelConfig
from helios.catalog import read_model
from helios.engine.backends.kv_cache import KVCache, kv_bytes, kv_dtype
from helios.engine.plan import load_plan
from helios.engine.settings import EngineSettings
from helios.engine.weights.loader import load_packed
from helios.footprint import activation_bytes, kv_bytes_per_token, model_bytes, weight_bytes
from helios.modes import Precision
from tests import llama_variants
from tests.opt_variants import VARIANTS, Head, save_variant

CPU = torch.device("cpu")
PACKED = (Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8)
EXITS = (2, 4, 6)
# Multiples of a tile, so packing adds no padding.
SIZES = {"vocab_size": 288, "hidden_size": 64, "ffn_dim": 128}


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    save_variant(tmp_path, "pre-norm", 1, **SIZES)
    return read_model(tmp_path).config


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_take_what_loading_them_takes(tmp_path: Path, variant: str, precision: Precision) -> None:
    widths = {"word_embed_proj_dim": 32 if "word_embed_proj_dim" in VARIANTS[variant] else 64}
    save_variant(tmp_path, variant, 1, exits=EXITS, **SIZES, **widths)
    entry = read_model(tmp_path)
    for depth in EXITS:
        loaded = load_packed(entry, depth, [depth], precision, CPU)
        assert weight_bytes(entry.config, precision, depth) == loaded.weight_bytes
    assert model_bytes(entry, precision) == weight_bytes(entry.config, precision)


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("head", ["shared", "linear"])
@pytest.mark.parametrize("variant", llama_variants.VARIANTS)
def test_weights_of_llamas_take_what_loading_them_takes(
    tmp_path: Path, variant: str, head: Head, precision: Precision
) -> None:
    # Multiples of a tile, as in real models.
    sizes = {
        "vocab_size": 288,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "head_dim": 32,
        "num_key_value_heads": {"all-kv-heads": 4, "one-kv-head": 1}.get(variant, 2),
    }
    llama_variants.save_variant(tmp_path, variant, 1, exits=EXITS, head=head, **sizes)
    entry = read_model(tmp_path)
    assert model_bytes(entry, precision) == load_packed(entry, 6, EXITS, precision, CPU).weight_bytes
    if head == "shared":
        shorter = entry.within(64)
        loaded = load_packed(shorter, 4, [4], precision, CPU)
        assert weight_bytes(shorter.config, precision, 4) == loaded.weight_bytes


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("head", ["norm", "linear"])
def test_a_model_loaded_with_every_exit_has_their_heads_too(
    tmp_path: Path, head: Head, precision: Precision
) -> None:
    save_variant(tmp_path, "pre-norm", 1, exits=EXITS, head=head, **SIZES)
    entry = read_model(tmp_path)
    assert model_bytes(entry, precision) == load_packed(entry, 6, EXITS, precision, CPU).weight_bytes


@pytest.mark.parametrize("precision", [*PACKED, Precision.FLOAT16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_keys_and_values_take_what_their_blocks_take(
    config: ModelConfig, kv_heads: int, precision: Precision
) -> None:
    # Head widths are multiples of a register, so int8 adds no padding.
    shape = replace(config, num_kv_heads=kv_heads, head_dim=64)
    block = kv_bytes(kv_heads, 64, 16, kv_dtype(precision, CPU))
    assert 16 * kv_bytes_per_token(shape, 6, precision) == 6 * block


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("variant", llama_variants.VARIANTS)
def test_a_plan_counts_the_keys_and_values_that_its_cache_holds(
    tmp_path: Path, variant: str, precision: Precision
) -> None:
    llama_variants.save_variant(tmp_path, variant, 1)
    settings = EngineSettings(precision=precision, memory_bytes=64 << 20, max_running=1)
    plan = load_plan(tmp_path, None, settings)
    cache = KVCache.of(plan.model.config, 6, 3, 16, plan.model.kv_dtype, CPU)
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert plan.memory.kv_bytes_per_token == held // (3 * 16)


def test_activations_grow_with_the_tokens_and_the_sequences_of_a_step(config: ModelConfig) -> None:
    # Here query, key and value together are wider than the feed-forward.
    token = (4 * 64 + 3 * 64) * 2
    logits = 3 * 288 * 4
    assert activation_bytes(config, 2, 100, 8) == 100 * token + 8 * logits
    wide = replace(config, ffn_dim=256, is_gated=True)
    assert activation_bytes(wide, 2, 1, 0) == (4 * 64 + 2 * 256) * 2


def test_an_unknown_precision_counts_as_the_widest(config: ModelConfig) -> None:
    assert weight_bytes(config, "float8") == weight_bytes(config, Precision.FLOAT32)
