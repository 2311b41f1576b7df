"""A model's step as one compiled call, and its layers as another: no Python between their products."""

from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from helios.engine import kernels
from helios.engine.batch import Batch
from helios.engine.checkpoint import Norm
from helios.engine.inner_product import BFLOAT16, FLOAT32, TILE
from helios.engine.kv_cache import KVCache
from helios.engine.linear import Linear, PackedLinear
from helios.engine.packed_weights import Ends, Head, Layer, PackedWeights
from helios.engine.readout import SUMMARY, Readout
from helios.engine.team import TEAM
from helios.model_config import ModelConfig

# Of `kernels.step`: numbers of the ends' addresses, and where among them the width of embeddings is.
_ENDS, _EMBED_WIDTH = 20, 5
_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: kernels.FLOAT16}


class CompiledModel:
    """What `kernels.step` and its parts need of a model: the addresses of its tensors, kept alive here.

    One caller at a time: all steps work in the same room.
    """

    def __init__(self, config: ModelConfig, numbers: int, weights: PackedWeights) -> None:
        """weights: with linears that are packed, all in the same numbers."""
        self._config, self._numbers, self._layers = config, numbers, weights.layers
        self._affines = [
            [*_affine(layer.attn_norm, config.hidden_size), *_affine(layer.ffn_norm, config.hidden_size)]
            for layer in weights.layers
        ]
        self._parts = np.array(
            [
                [
                    *(tensor.data_ptr() for tensor in affines),
                    *(address for part in _packed(layer) for address in part.addresses),
                ]
                for affines, layer in zip(self._affines, weights.layers, strict=True)
            ]
        )
        self._vocabulary = config.vocab_size
        self._ends = _addresses_of_ends(weights.ends)
        # Beside each head's addresses what they are of.
        self._exits = {
            layer: _addresses_of_head(head, config.hidden_size) for layer, head in weights.exits.items()
        }
        self._final = _addresses_of_head(weights.final or Head(None, None), config.hidden_size)
        self._room = _Room.of(0, 0, 0)

    @classmethod
    def of(cls, config: ModelConfig, weights: PackedWeights) -> Self | None:
        """None where the model is not what the kernels compute."""
        products: list[Linear | None] = [
            *(part for layer in weights.layers for part in _products(layer)),
            *(getattr(weights.ends, name) for name in ("project_in", "project_out", "lm_head")),
            *(head.linear for head in weights.exits.values()),
        ]
        found = [part for part in products if part is not None]
        numbers = {part.numbers for part in found if isinstance(part, PackedLinear)}
        is_packed = all(isinstance(part, PackedLinear) for part in found)
        if config.activation != "relu" or not is_packed:
            return None
        (only,) = numbers
        return cls(config, only, weights)

    def step(self, batch: Batch, cache: KVCache, depth: int) -> Readout:
        """The first `depth` layers of a batch and the reading of its rows; writes the KV of them all.

        What it returns is valid until the next step.
        """
        config = self._config
        rows, reads = batch.rows, batch.reads
        width, embed_width = config.hidden_size, int(self._ends[_EMBED_WIDTH])
        context = batch.width * batch.block_tokens
        if rows > self._room.rows:
            size = kernels.step_scratch(self._numbers, rows, width, config.ffn_dim, embed_width)
            self._room = _Room.of(rows, size, self._vocabulary)
        scratch, logits, best, summaries = self._room.tensors
        keys, values = cache.addresses
        TEAM.run(
            kernels.step,
            self._numbers,
            self._parts,
            depth,
            self._ends,
            self._exits.get(depth, self._final)[0],
            rows,
            width,
            config.ffn_dim,
            config.num_heads,
            config.norm_before,
            keys,
            values,
            cache.block_tokens,
            batch.addresses,
            reads,
            self._vocabulary,
            scratch.data_ptr(),
            logits.data_ptr(),
            best.data_ptr(),
            summaries.data_ptr(),
            operations=depth * rows * 2 * width * (2 * width + config.ffn_dim + context)
            + reads * embed_width * self._vocabulary,
        )
        return Readout(logits[:reads], best[:reads], summaries[:reads])

    def layers(
        self, hidden: torch.Tensor, batch: Batch, cache: KVCache, first: int, last: int
    ) -> torch.Tensor:
        """The layers first..last of hidden, float32 [T, hidden]; writes the rows' KV."""
        config, rows = self._config, len(hidden)
        width, context = config.hidden_size, batch.width * batch.block_tokens
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


class _Room(NamedTuple):
    """Tensors that steps of so many rows work in: scratch, logits, best and summaries (`Readout`)."""

    rows: int
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, rows: int, scratch_bytes: int, vocabulary: int) -> Self:
        """Memory comes at its first use: a step of many rows reads few of them."""
        return cls(
            rows,
            (
                torch.empty(scratch_bytes, dtype=torch.uint8),
                torch.empty(rows, vocabulary),
                torch.empty(rows, dtype=torch.int64),
                torch.empty(rows, SUMMARY),
            ),
        )


def _addresses_of_ends(ends: Ends) -> NDArray[np.int64]:
    """As `kernels.step` takes them."""
    found = np.zeros(_ENDS, dtype=np.int64)
    if ends.embed_tokens is not None:
        table, width = ends.embed_tokens, ends.embed_tokens.shape[1]
        found[:6] = table.data_ptr(), _KINDS[table.dtype], 1, width, width, width
    else:
        # [tiles, words, channels of a tile, numbers of a word]
        assert isinstance(ends.lm_head, PackedLinear)
        table, width = ends.lm_head.tensors[0], ends.lm_head.in_size
        found[:6] = table.data_ptr(), _KINDS[table.dtype], TILE, table.shape[3], table[0].numel(), width
    found[6:8] = ends.embed_positions.data_ptr(), _KINDS[ends.embed_positions.dtype]
    for place, part in ((8, ends.project_in), (12, ends.project_out), (16, ends.lm_head)):
        if isinstance(part, PackedLinear):
            found[place : place + kernels.PARTS] = part.addresses
    return found


def _addresses_of_head(head: Head, width: int) -> tuple[NDArray[np.int64], list[torch.Tensor]]:
    """As `kernels.step` takes them, and the tensors that must stay where they are."""
    found, kept = np.zeros(2 + kernels.PARTS, dtype=np.int64), []
    if head.norm is not None:
        kept = list(_affine(head.norm, width))
        found[:2] = [tensor.data_ptr() for tensor in kept]
    if isinstance(head.linear, PackedLinear):
        found[2:] = head.linear.addresses
    return found, kept


def _products(layer: Layer) -> tuple[Linear, ...]:
    """In the order in which the kernel takes them."""
    return layer.qkv, layer.out, layer.fc1, layer.fc2


def _packed(layer: Layer) -> list[PackedLinear]:
    return [part for part in _products(layer) if isinstance(part, PackedLinear)]


def _affine(norm: Norm, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a norm that may have neither."""
    weight = torch.ones(width) if norm.weight is None else norm.weight
    return weight, torch.zeros(width) if norm.bias is None else norm.bias
