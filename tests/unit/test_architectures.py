"""An architecture is data. Code that reads, packs and counts models uses this data, not its name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helios.architectures.architecture import TensorNames
from helios.architectures.opt import OPT
from helios.architectures.registry import architecture_of, config_of
from helios.architectures.spec import LearnedPositions, ModelConfig
from helios.engine.weights.checkpoint import Checkpoint
from helios.engine.weights.packed_weights import pack_layer, parted
from helios.engine.weights.part_reader import PartReader
from helios.errors import CheckpointError
from tests.opt_variants import VARIANTS

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
    positions=LearnedPositions(offset=0),
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
        weight = part.weight * part.scales[:, None]
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


def test_an_architecture_that_is_not_served_is_refused_naming_those_that_are() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'gated'; supported: opt"):
        config_of({"model_type": "gated"}, Path("config.json"))
