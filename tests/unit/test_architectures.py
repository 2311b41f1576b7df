"""An architecture is data. Code that reads, packs and counts models uses this data, not its name."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from helios.architectures.architecture import TensorNames
from helios.architectures.opt import OPT
from helios.architectures.registry import architecture_of, config_of, read_config
from helios.architectures.spec import LearnedPositions, ModelConfig, RotaryPositions
from helios.engine.kernels.inner_product import GROUP
from helios.engine.weights.checkpoint import Checkpoint
from helios.engine.weights.packed_weights import pack_layer, parted
from helios.engine.weights.part_reader import PartReader
from helios.engine.weights.rotation import frequencies
from helios.errors import CheckpointError
from tests import llama_variants
from tests.opt_variants import VARIANTS
from tests.real_configs import REAL

FILE = Path("config.json")
LLAMA_FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
}

# No real model: it has a gate, RMS norms, fewer KV heads than query heads, and a separate head width.
GATED = ModelConfig(
    model_type="gated",
    vocab_size=96,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    ffn_dim=160,
    context_tokens=32,
    embed_size=64,
    positions=LearnedPositions(offset=0, rows=32),
    norm="rms",
    norm_epsilon=1e-6,
    norm_before=True,
    norm_affine=True,
    has_final_norm=True,
    activation="gelu",
    is_gated=True,
    qkv_bias=True,
    out_bias=False,
    ffn_bias=False,
    has_head_norm=False,
    tied_head=False,
    bos_token_id=None,
    eos_token_ids=(2, 3),
    pad_token_id=None,
    dtype="float32",
)
NAMES = TensorNames(
    prefixes=("model.",),
    embed_tokens="tokens",
    embed_positions="positions",
    attn_norm="blocks.{}.norm_1",
    q="blocks.{}.query",
    k="blocks.{}.key",
    v="blocks.{}.value",
    out="blocks.{}.output",
    ffn_norm="blocks.{}.norm_2",
    gate="blocks.{}.gate",
    fc1="blocks.{}.up",
    fc2="blocks.{}.down",
    final_norm="norm",
    lm_head="lm_head",
)
LAYER = {
    "norm_1.weight": (64,),
    "query.weight": (96, 64),
    "query.bias": (96,),
    "key.weight": (48, 64),
    "key.bias": (48,),
    "value.weight": (48, 64),
    "value.bias": (48,),
    "output.weight": (64, 96),
    "norm_2.weight": (64,),
    "gate.weight": (160, 64),
    "up.weight": (160, 64),
    "down.weight": (64, 160),
}
ENDS = {
    "model.tokens.weight": (96, 64),
    "model.positions.weight": (32, 64),
    "model.norm.weight": (64,),
    "model.lm_head.weight": (96, 64),
}


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of the gated model, written to the test's directory."""
    torch.manual_seed(0)
    shapes = ENDS | {f"model.blocks.{layer}.{name}": s for layer in range(2) for name, s in LAYER.items()}
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(found, tmp_path / "model.safetensors")
    return found


def test_the_parts_are_read_under_the_names_and_in_the_shapes_of_the_description(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with Checkpoint(tmp_path, NAMES.prefixes) as checkpoint:
        reader = PartReader(checkpoint, GATED, NAMES, torch.float32)
        table = reader.embed_tokens()
        assert torch.equal(reader.embed_positions(), tensors["model.positions.weight"])
        assert torch.equal(reader.lm_head(table), tensors["model.lm_head.weight"])
        final = reader.final_norm()
        assert final is not None
        assert torch.equal(final.weight, tensors["model.norm.weight"])
        assert final.bias is None
        assert reader.project_in() is None
        layer = reader.layer(1)
        assert checkpoint.bytes_read < sum(tensor.nbytes for tensor in tensors.values())
        reader.layer(0)
        assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(layer.k.bias, tensors["model.blocks.1.key.bias"])
    assert layer.out.bias is None
    packed = pack_layer(layer)
    assert (packed.qkv.out_size, packed.qkv.in_size) == (96 + 2 * 48, 64)
    assert (packed.fc1.out_size, packed.fc1.in_size) == (2 * 160, 64)
    x = torch.randn(3, 64)
    gate, up = parted(packed.fc1(x), 160)
    assert torch.allclose(gate, x @ tensors["model.blocks.1.gate.weight"].T, atol=1e-4)
    assert torch.allclose(up, x @ tensors["model.blocks.1.up.weight"].T, atol=1e-4)


def test_in_int8_what_leaves_a_norm_goes_into_every_product_that_reads_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with Checkpoint(tmp_path, NAMES.prefixes) as checkpoint:
        layer = PartReader(checkpoint, GATED, NAMES, torch.float32, is_quantized=True).layer(0)
    assert layer.ffn_norm.weight is not None
    moved = tensors["model.blocks.0.norm_2.weight"] / layer.ffn_norm.weight
    for part, name in ((layer.gate, "gate"), (layer.fc1, "up")):
        assert part is not None and part.scales is not None
        # There is a scale for each group of inputs.
        weight = part.weight * part.scales.repeat_interleave(GROUP, dim=1)[:, : part.weight.shape[1]]
        expected = tensors[f"model.blocks.0.{name}.weight"] * moved
        assert torch.allclose(weight, expected, atol=expected.abs().max().item() / 100)


def test_parameters_are_all_numbers_of_the_checkpoint(tensors: dict[str, torch.Tensor]) -> None:
    assert GATED.parameters() == sum(tensor.numel() for tensor in tensors.values())
    layer = sum(tensor.numel() for name, tensor in tensors.items() if "blocks.0" in name)
    assert GATED.parameters(2) - GATED.parameters(1) == layer
    ends = tensors["model.lm_head.weight"].numel() + tensors["model.norm.weight"].numel()
    assert GATED.step_parameters(1) == layer + ends
    assert GATED.kv_numbers(2) == 2 * 2 * 2 * 24


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_opt_writes_it_reads_again(variant: str) -> None:
    fields = VARIANTS[variant] | {"model_type": "opt", "dtype": "float16", "eos_token_id": [2, 7]}
    config = config_of(fields, Path("config.json"))
    assert architecture_of(config) is OPT
    for one in (config, replace(config, eos_token_ids=(5,)), replace(config, eos_token_ids=())):
        assert config_of(OPT.write(one), Path("config.json")) == one


@pytest.mark.parametrize("variant", llama_variants.VARIANTS)
def test_what_llamas_write_they_and_transformers_read_again(tmp_path: Path, variant: str) -> None:
    config = config_of(llama_variants.config_of(variant).to_dict(), FILE)
    architecture = architecture_of(config)
    for one in (
        config,
        replace(config, eos_token_ids=(5, 7)),
        replace(config, eos_token_ids=(), dtype="bfloat16"),
    ):
        fields = architecture.write(one)
        assert config_of(fields, FILE) == one
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert config_of(AutoConfig.from_pretrained(tmp_path).to_dict(), FILE) == one


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_as_many_parameters_as_their_cards_state(name: str) -> None:
    fields, parameters = REAL[name]
    config = config_of(fields, FILE)
    assert config.parameters() == parameters
    assert config.context_tokens == fields["max_position_embeddings"]
    assert config_of(architecture_of(config).write(config), FILE) == config


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_older_fields_of_rotary_positions_mean_what_newer_ones_mean(kind: str) -> None:
    scaling = SCALINGS[kind]
    newer = config_of(
        LLAMA_FIELDS | {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5} | scaling}, FILE
    )
    for name in ("type", "rope_type"):
        older = {"rope_theta": 5e5, "rope_scaling": {name: kind} | scaling if scaling else None}
        assert config_of(LLAMA_FIELDS | older, FILE) == newer
    assert isinstance(newer.positions, RotaryPositions)
    assert newer.positions.theta == 5e5
    assert (newer.positions.scaling is None) == (kind == "default")


@pytest.mark.parametrize(
    "fields",
    [
        *(
            LLAMA_FIELDS | {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5} | scaling}
            for kind, scaling in SCALINGS.items()
        ),
        *(fields for fields, _ in REAL.values()),
    ],
)
def test_frequencies_are_those_of_transformers(fields: dict[str, Any]) -> None:
    config = config_of(fields, FILE)
    assert isinstance(config.positions, RotaryPositions)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**(fields | {"model_type": "llama"}))).inv_freq
    assert torch.equal(frequencies(config.positions, config.head_dim), theirs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is of type 'yarn'; supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters is of type 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor must be a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"rope_parameters": ["linear"]}, "rope_parameters must be an object"),
        (
            {"rope_parameters": SCALINGS["llama3"] | {"rope_type": "llama3", "low_freq_factor": 4.0}},
            "rope_parameters.low_freq_factor .4. must be below high_freq_factor",
        ),
        ({"rope_theta": 0}, "rope_theta must be a number above 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"head_dim": 15}, "head_dim .15. must be even"),
        ({"head_dim": 0}, "head_dim must be a whole number of at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads .3. must divide num_attention_heads .4."),
        ({"num_key_value_heads": 8}, "num_key_value_heads .8. must divide num_attention_heads .4."),
        ({"num_attention_heads": 5}, "num_attention_heads .5. must divide hidden_size .64."),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1"),
        ({"num_attention_heads": None}, "num_attention_heads must be a whole number of at least 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a whole number"),
        ({"intermediate_size": None}, "intermediate_size must be a whole number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0"),
        ({"attention_bias": "no"}, "attention_bias must be true or false"),
        ({"eos_token_id": [2, 96]}, "eos_token_id must be an id of the vocabulary .96 tokens."),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config says that the weights"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is true; supported: false"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is .* supported: only full_attention",
        ),
        ({"model_type": "qwen2", "num_key_value_heads": None}, "num_key_value_heads must be a whole number"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported: opt, llama, qwen2, qwen3"),
    ],
)
def test_a_llama_that_is_not_served_is_refused_naming_the_field(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: {message}"):
        config_of(LLAMA_FIELDS | wrong, FILE)


def test_absent_fields_mean_what_transformers_takes_them_for() -> None:
    for model_type in ("llama", "qwen2", "qwen3"):
        fields = LLAMA_FIELDS | {"model_type": model_type, "num_key_value_heads": 4}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = AutoConfig.for_model(**fields).to_dict()
        assert config_of(fields, FILE) == config_of(theirs | {"num_key_value_heads": 4}, FILE)
    assert config_of({**LLAMA_FIELDS, "num_key_value_heads": None}, FILE).num_kv_heads == 4


def test_all_ends_of_a_text_come_from_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_FIELDS | {"eos_token_id": 2}))
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 8, 9]}))
    assert read_config(tmp_path).eos_token_ids == (3, 8, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 128009]}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be an id"):
        read_config(tmp_path)


def test_an_architecture_that_is_not_served_is_refused_naming_those_that_are() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'gated'; supported: opt"):
        config_of({"model_type": "gated"}, Path("config.json"))
