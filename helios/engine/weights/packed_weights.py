"""A partial model's weights in the form in which it computes with them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch

from helios.engine.weights.checkpoint import LayerWeights, LinearWeights, Norm
from helios.engine.weights.linear import Linear, PackedLinear, linear


@dataclass(frozen=True, slots=True)
class Ends:
    """What every depth has: the way into the layers and, after an exit's head, out of them."""

    embed_tokens: torch.Tensor | None  # [vocabulary, embed]; None: the rows of the LM head
    embed_positions: torch.Tensor  # [context + 2, hidden]
    project_in: Linear | None
    project_out: Linear | None
    lm_head: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's weights as the step uses them: query, key and value in one product."""

    attn_norm: Norm
    qkv: Linear
    out: Linear
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True, slots=True)
class Head:
    """What an exit has of its own; a model's last layer, and exits without, have its final norm."""

    norm: Norm | None
    linear: Linear | None


Part: TypeAlias = Ends | Layer | Head


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The first `len(layers)` layers and what reads tokens out of them. Never changed: models share parts."""

    # Equal for the same checkpoint packed in the same way (`loader.weights_id`).
    id: str
    # Equal for the same files in the same place (`catalog.checkpoint_id`).
    checkpoint_id: str
    # Numbers that products are computed in.
    precision: str
    ends: Ends
    layers: Sequence[Layer]
    # None when every exit loaded has its own head.
    final: Head | None
    # By exit layer, those that are not read out through `final`.
    exits: Mapping[int, Head]
    # To load them: of the checkpoint's files, or of their packed form.
    bytes_read: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all, shared ones once."""
        return tensor_bytes((self.ends, *self.layers, self.final, *self.exits.values()))

    def bytes_at(self, depth: int) -> int:
        """Bytes of a model that is loaded to an exit layer of this one."""
        return tensor_bytes((self.ends, *self.layers[:depth], self.exits.get(depth, self.final)))


def tensor_bytes(parts: Iterable[Part | None]) -> int:
    """Bytes of the parts' tensors, those that several have once."""
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
    """Query, key and value become one product; norms are in the type of activations."""
    parts = (layer.q, layer.k, layer.v)
    biases = [part.bias for part in parts if part.bias is not None]
    scales = [part.scales for part in parts if part.scales is not None]
    qkv = LinearWeights(
        torch.cat([part.weight for part in parts]),
        torch.cat(biases) if biases else None,
        torch.cat(scales) if scales else None,
    )
    out, fc1, fc2 = linear(layer.out), linear(layer.fc1), linear(layer.fc2)
    attn_norm, ffn_norm = (pack_norm(norm, out) for norm in (layer.attn_norm, layer.ffn_norm))
    return Layer(attn_norm, linear(qkv), out, ffn_norm, fc1, fc2)


def pack_norm(norm: Norm, beside: Linear) -> Norm:
    """In the type of the activations of a model that has the linear `beside`."""
    if not isinstance(beside, PackedLinear):
        return norm
    return Norm(*(None if part is None else part.float() for part in (norm.weight, norm.bias)))


def pack_optional(weights: LinearWeights | None) -> Linear | None:
    """None where there are none."""
    return None if weights is None else linear(weights)
