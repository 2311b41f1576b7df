"""A partial model's weights in the form that computations use."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch.nn import functional as F

from helios.engine.kernels.simd import LANES
from helios.engine.weights.linear import Linear, PackedLinear, linear
from helios.engine.weights.parts import LayerWeights, LinearWeights, Norm

# Rows of a gate beside each other: half a tile, which is one register of outputs.
GATE_ROWS = LANES


@dataclass(frozen=True, slots=True)
class Ends:
    """The parts that every depth has: embeddings before the layers, projections and LM head after them."""

    embed_tokens: torch.Tensor | None  # [vocabulary, embed]; None: they are the rows of the LM head
    embed_positions: torch.Tensor | None  # [offset + context, hidden]; None: positions are not learned
    # Cosines, then sines, of each position's angles, float32 [context, head_dim]. None: not rotary.
    rotation: torch.Tensor | None
    project_in: Linear | None
    project_out: Linear | None
    lm_head: Linear

    @property
    def device(self) -> torch.device:
        """Where all weights are."""
        return self.lm_head.tensors[0].device


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's weights as a step uses them. Products with the same input are joined.

    qkv: query, key and value, [query heads + 2 * KV heads, each of head_dim, hidden]. q_norm, k_norm: of each
    head, [head_dim]; None: heads have no norms. fc1: [ffn, hidden], or with a gate the rows of both
    (`interleaved`).
    """

    attn_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True, slots=True)
class Head:
    """What an exit applies before the LM head: its own head, or the model's final norm."""

    norm: Norm | None
    linear: Linear | None


Part: TypeAlias = Ends | Layer | Head


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The first `len(layers)` layers, and what reads out tokens. Immutable, so models may share parts."""

    # Equal for the same checkpoint packed in the same way (`loader.weights_id`).
    id: str
    # Equal for the same files at the same path (`catalog.checkpoint_id`).
    checkpoint_id: str
    # The precision of the products.
    precision: str
    ends: Ends
    layers: Sequence[Layer]
    # None when every loaded exit has its own head.
    final: Head | None
    # The own heads of exits, by exit layer. Other exits use `final`.
    exits: Mapping[int, Head]
    # Bytes read to load the weights, from the checkpoint or from the packed cache.
    bytes_read: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parts. Tensors that several parts share count once."""
        return tensor_bytes((self.ends, *self.layers, self.final, *self.exits.values()))

    def bytes_at(self, depth: int) -> int:
        """Bytes of the same model when loaded only up to an exit layer."""
        return tensor_bytes((self.ends, *self.layers[:depth], self.exits.get(depth, self.final)))


def tensor_bytes(parts: Iterable[Part | None]) -> int:
    """Bytes of the parts' tensors. Tensors that several parts share count once."""
    found = (tensor for part in parts if part is not None for tensor in tensors_of(part))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())


def tensors_of(part: Part) -> Iterator[torch.Tensor]:
    """All tensors of a part."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Norm):
            yield from (tensor for tensor in (value.weight, value.bias) if tensor is not None)
        elif value is not None:
            yield from value.tensors


def pack_layer(layer: LayerWeights) -> Layer:
    """Joins products that read the same input, and gives norms the type of activations."""
    qkv = linear(_joined(layer.q, layer.k, layer.v))
    fc1 = linear(layer.fc1 if layer.gate is None else interleaved(layer.gate, layer.fc1))
    out, fc2 = linear(layer.out), linear(layer.fc2)
    attn_norm, ffn_norm = (pack_norm(norm, out) for norm in (layer.attn_norm, layer.ffn_norm))
    q_norm, k_norm = (None if norm is None else pack_norm(norm, out) for norm in (layer.q_norm, layer.k_norm))
    return Layer(attn_norm, qkv, q_norm, k_norm, out, ffn_norm, fc1, fc2)


def pack_norm(norm: Norm, beside: Linear) -> Norm:
    """A norm in the type of activations: float32 where the linear beside it is packed."""
    if not isinstance(beside, PackedLinear):
        return norm
    return Norm(*(None if part is None else part.float() for part in (norm.weight, norm.bias)))


def pack_optional(weights: LinearWeights | None) -> Linear | None:
    """The linear layer of these weights, or None for a model without them."""
    return None if weights is None else linear(weights)


def interleaved(gate: LinearWeights, up: LinearWeights) -> LinearWeights:
    """Joins the gate with the product beside it: `GATE_ROWS` rows of one, then of the other, and so on.

    So both factors of an output lie in one tile of a packed product. Both are padded with rows of zeros to a
    multiple of `GATE_ROWS`.
    """

    def woven(*parts: torch.Tensor) -> torch.Tensor:
        spare = -len(parts[0]) % GATE_ROWS
        padded = [F.pad(part, (0, 0) * (part.dim() - 1) + (0, spare)) for part in parts]
        return torch.stack([part.unflatten(0, (-1, GATE_ROWS)) for part in padded], dim=1).flatten(0, 2)

    bias = None if gate.bias is None or up.bias is None else woven(gate.bias, up.bias)
    scales = None if gate.scales is None or up.scales is None else woven(gate.scales, up.scales)
    return LinearWeights(woven(gate.weight, up.weight), bias, scales)


def parted(joined: torch.Tensor, ffn_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of gate and up, [rows, ffn] each, in the output of their joined product."""
    gate, up = joined.unflatten(1, (-1, 2, GATE_ROWS)).unbind(2)
    return gate.flatten(1)[:, :ffn_dim], up.flatten(1)[:, :ffn_dim]


def _joined(*parts: LinearWeights) -> LinearWeights:
    """Joins products that read the same input, with their rows one below the other."""
    biases = [part.bias for part in parts if part.bias is not None]
    scales = [part.scales for part in parts if part.scales is not None]
    return LinearWeights(
        torch.cat([part.weight for part in parts]),
        torch.cat(biases) if biases else None,
        torch.cat(scales) if scales else None,
    )
