"""A model's decoder layers as one compiled call: no Python between their products."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from helios.engine import kernels
from helios.engine.batch import Batch
from helios.engine.checkpoint import Norm
from helios.engine.kv_cache import KVCache
from helios.engine.linear import Linear, PackedLinear
from helios.engine.team import TEAM
from helios.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's weights as the step uses them: query, key and value in one product."""

    attn_norm: Norm
    qkv: Linear
    out: Linear
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear


class CompiledLayers:
    """What `kernels.layers` needs of a model's layers: the addresses of their tensors, kept alive here."""

    def __init__(self, config: ModelConfig, numbers: int, layers: Sequence[Layer]) -> None:
        """layers: with linears that are packed, all in the same numbers."""
        self._config, self._numbers, self._layers = config, numbers, layers
        self._affines = [
            [*_affine(layer.attn_norm, config.hidden_size), *_affine(layer.ffn_norm, config.hidden_size)]
            for layer in layers
        ]
        self._parts = np.array(
            [
                [
                    *(tensor.data_ptr() for tensor in affines),
                    *(address for part in _packed(layer) for address in part.addresses),
                ]
                for affines, layer in zip(self._affines, layers, strict=True)
            ]
        )

    @classmethod
    def of(cls, config: ModelConfig, layers: Sequence[Layer]) -> Self | None:
        """None where the layers are not what the kernels compute."""
        numbers = {part.numbers for layer in layers for part in _packed(layer)}
        complete = all(len(_packed(layer)) == 4 for layer in layers)
        if config.activation != "relu" or not complete:
            return None
        (only,) = numbers
        return cls(config, only, layers)

    def __call__(
        self, hidden: torch.Tensor, batch: Batch, cache: KVCache, first: int, last: int
    ) -> torch.Tensor:
        """The layers first..last of hidden, float32 [T, hidden]; writes the rows' KV."""
        config, rows = self._config, len(hidden)
        width, context = config.hidden_size, batch.tables.shape[1] * batch.block_tokens
        size = kernels.layers_scratch(self._numbers, rows, config.hidden_size, config.ffn_dim)
        scratch = torch.empty(size, dtype=torch.uint8)
        keys, values = cache.addresses
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        TEAM.run(
            kernels.layers,
            self._numbers,
            self._parts,
            first,
            last,
            hidden.data_ptr(),
            rows,
            config.hidden_size,
            config.ffn_dim,
            config.num_heads,
            config.norm_before,
            keys,
            values,
            cache.block_tokens,
            batch.addresses,
            scratch.data_ptr(),
            operations=(last - first) * rows * 2 * width * (2 * width + config.ffn_dim + context),
        )
        return hidden

    def propagate(self, hidden: torch.Tensor, slots: torch.Tensor, cache: KVCache, first: int) -> None:
        """KV of the layers from `first` on, with float32 [rows, hidden] as their input; slots: [rows]."""
        config, rows = self._config, len(hidden)
        size = kernels.propagate_scratch(self._numbers, rows, config.hidden_size)
        scratch = torch.empty(size, dtype=torch.uint8)
        keys, values = cache.addresses
        hidden, slots = hidden.contiguous(), slots.contiguous()
        TEAM.run(
            kernels.propagate,
            self._numbers,
            self._parts,
            first,
            len(self._layers),
            hidden.data_ptr(),
            rows,
            config.hidden_size,
            config.num_heads,
            config.norm_before,
            keys,
            values,
            cache.block_tokens,
            slots.data_ptr(),
            scratch.data_ptr(),
            operations=(len(self._layers) - first) * rows * 3 * config.hidden_size**2,
        )


def _packed(layer: Layer) -> list[PackedLinear]:
    """Its products, in the order in which the kernel takes them."""
    parts = (layer.qkv, layer.out, layer.fc1, layer.fc2)
    return [part for part in parts if isinstance(part, PackedLinear)]


def _affine(norm: Norm, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a norm that may have neither."""
    weight = torch.ones(width) if norm.weight is None else norm.weight
    return weight, torch.zeros(width) if norm.bias is None else norm.bias
