"""A model's step as one compiled call, and its layers as another: no Python between their products."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from helios.architectures.spec import ModelConfig
from helios.engine.backends.burst import Burst
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.readout import Readout
from helios.engine.kernels import step as kernels
from helios.engine.kernels.inner_product import BFLOAT16, FLOAT32, TILE
from helios.engine.kernels.sampling import SUMMARY, room_numbers
from helios.engine.kernels.team import TEAM
from helios.engine.scheduling.batch import Batch
from helios.engine.weights.linear import Linear, PackedLinear
from helios.engine.weights.packed_weights import Ends, Head, Layer, PackedWeights
from helios.engine.weights.parts import Norm

# Numbers of what `kernels.step` is told of a model's ends.
_ENDS = 20
# Sizes of steps whose readouts are kept.
_KEPT_READOUTS = 256
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
        self._ends = _addresses_of_ends(weights.ends)
        self._heads = {layer: _Head.of(head, config.hidden_size) for layer, head in weights.exits.items()}
        self._final = _Head.of(weights.final or Head(None, None), config.hidden_size)
        self._exits: dict[tuple[tuple[int, float], ...], _Exits] = {}
        self._room = _Room.of(0, 0, 0, 0, works=False)
        # Where each thread draws tokens, and how much it takes.
        self._drawing, self._drawing_size = torch.empty(0), int(room_numbers(config.vocab_size))

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

    def step(self, batch: Batch, cache: KVCache, depth: int, burst: Burst) -> Readout:
        """The first `depth` layers of a batch and the reading of its rows; writes the KV of them all.

        Of several steps the logits are the last one's, and all else is of all that were taken, one after the
        other. What it returns is valid until the next call.
        """
        count = self._run(batch, cache, ((depth, 0.0),), burst)
        return self._room.read(batch.reads, count)

    def step_dynamic(
        self, batch: Batch, cache: KVCache, thresholds: Mapping[int, float], burst: Burst
    ) -> tuple[Readout, list[int]]:
        """All layers, from which decode rows leave at the first exit of `thresholds` where they are sure.

        Also the exit layer of each row that is read. Several steps and validity as in `step`.
        """
        depth = len(self._layers)
        before = ((layer, threshold) for layer, threshold in thresholds.items() if layer < depth)
        count = self._run(batch, cache, (*sorted(before), (depth, 0.0)), burst)
        exit_layers = self._room.out[3][: count * batch.reads]
        return self._room.read(batch.reads, count), exit_layers.tolist()

    def _run(self, batch: Batch, cache: KVCache, exits: tuple[tuple[int, float], ...], burst: Burst) -> int:
        """exits: layers, ascending, and how sure a row must be to leave there. How many steps were taken."""
        config, depth, count = self._config, exits[-1][0], burst.steps
        rows, reads, width, embed_width = batch.rows, batch.reads, config.hidden_size, int(self._ends[5])
        if not self._room.holds(rows, count * reads, works=len(exits) > 1):
            # As much as any call before needed, too: prompts and bursts take turns.
            most, kept = max(rows, self._room.rows), max(count * reads, len(self._room.out[1]))
            works = len(exits) > 1 or self._room.found is not None
            size = kernels.step_scratch(self._numbers, most, width, config.ffn_dim, embed_width)
            self._room = _Room.of(most, kept, size, config.vocab_size, works=works)
        if exits not in self._exits:
            self._exits[exits] = _Exits.of(exits, [self._heads.get(layer, self._final) for layer, _ in exits])
        if len(burst.draws.numbers):
            needed = TEAM.threads * self._drawing_size
            if len(self._drawing) < needed:
                self._drawing = torch.empty(needed)
        room, chosen = self._room, self._exits[exits]
        TEAM.run(
            kernels.burst,
            count,
            *burst.draws,
            self._drawing.data_ptr(),
            0 if burst.interrupt is None else burst.interrupt.address,
            burst.last_tokens,
            self._numbers,
            self._parts,
            chosen.layers,
            chosen.thresholds,
            chosen.heads,
            self._ends,
            rows,
            batch.decode_rows,
            *self._of_layers(batch, cache),
            reads,
            config.vocab_size,
            room.scratch.data_ptr(),
            room.places[0],
            room.places[1],
            operations=depth * rows * self._operations(batch) + reads * embed_width * config.vocab_size,
        )
        return count if burst.interrupt is None else burst.interrupt.steps_of(count)

    def layers(
        self, hidden: torch.Tensor, batch: Batch, cache: KVCache, first: int, last: int
    ) -> torch.Tensor:
        """The layers first..last of hidden, float32 [T, hidden]; writes the rows' KV."""
        config, rows = self._config, len(hidden)
        size = kernels.layers_scratch(self._numbers, rows, config.hidden_size, config.ffn_dim)
        scratch = torch.empty(size, dtype=torch.uint8)
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        TEAM.run(
            kernels.layers,
            self._numbers,
            self._parts,
            first,
            last,
            hidden.data_ptr(),
            rows,
            *self._of_layers(batch, cache),
            scratch.data_ptr(),
            operations=(last - first) * rows * self._operations(batch),
        )
        return hidden

    def _of_layers(self, batch: Batch, cache: KVCache) -> tuple[Any, ...]:
        """From width to rows_of, as `kernels.layers` takes them."""
        config = self._config
        shape = config.hidden_size, config.ffn_dim, config.num_heads, config.norm_before
        return *shape, *cache.addresses, cache.block_tokens, batch.addresses

    def _operations(self, batch: Batch) -> int:
        """Multiply-adds of a layer for one row, about."""
        width, context = self._config.hidden_size, batch.width * batch.block_tokens
        return 2 * width * (2 * width + self._config.ffn_dim + context)


class _Head(NamedTuple):
    """The addresses of an exit's head, and the tensors that must stay where they are."""

    addresses: NDArray[np.int64]
    kept: list[torch.Tensor]

    @classmethod
    def of(cls, head: Head, width: int) -> Self:
        found, kept = np.zeros(2 + kernels.PARTS, dtype=np.int64), []
        if head.norm is not None:
            kept = list(_affine(head.norm, width))
            found[:2] = [tensor.data_ptr() for tensor in kept]
        if isinstance(head.linear, PackedLinear):
            found[2:] = head.linear.addresses
        return cls(found, kept)


class _Exits(NamedTuple):
    """Exits as `kernels.step` takes them."""

    layers: NDArray[np.int64]
    thresholds: NDArray[np.float32]
    heads: NDArray[np.int64]

    @classmethod
    def of(cls, exits: Sequence[tuple[int, float]], heads: Sequence[_Head]) -> Self:
        layers, thresholds = zip(*exits, strict=True)
        addresses = np.stack([head.addresses for head in heads])
        return cls(np.array(layers, dtype=np.int64), np.array(thresholds, dtype=np.float32), addresses)


class _Room(NamedTuple):
    """Tensors that steps of so many rows work in, and what they read out."""

    rows: int
    scratch: torch.Tensor
    # Logits, best and summaries (`Readout`), and exit layers; and the same to work in, if exits are several.
    out: tuple[torch.Tensor, ...]
    found: tuple[torch.Tensor, ...] | None
    # Addresses of `found` and of `out`.
    places: tuple[NDArray[np.int64], NDArray[np.int64]]
    # What was read here before, by sizes.
    readouts: dict[tuple[int, int], Readout]

    @classmethod
    def of(cls, rows: int, reads: int, scratch_bytes: int, vocabulary: int, *, works: bool) -> Self:
        """Memory comes at its first use: a step of many rows reads few of them. reads: of all steps."""
        kept = max(rows, reads)

        def outputs() -> tuple[torch.Tensor, ...]:
            return (
                torch.empty(rows, vocabulary),
                torch.empty(kept, dtype=torch.int64),
                torch.empty(kept, SUMMARY),
                torch.empty(kept, dtype=torch.int64),
            )

        out, found = outputs(), outputs() if works else None
        places = [np.array([tensor.data_ptr() for tensor in tensors]) for tensors in (found or out, out)]
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8)
        return cls(rows, scratch, out, found, (places[0], places[1]), {})

    def read(self, reads: int, count: int) -> Readout:
        """What `count` steps of so many reads have read out; kept, as the next are mostly of these sizes."""
        key = reads, count
        if key not in self.readouts:
            if len(self.readouts) >= _KEPT_READOUTS:
                self.readouts.clear()
            logits, best, summaries, _ = self.out
            best, summaries = best[: count * reads], summaries[: count * reads]
            host = best.numpy(), summaries.numpy()
            self.readouts[key] = Readout(logits[:reads], best, summaries, host)
        return self.readouts[key]

    def holds(self, rows: int, reads: int, *, works: bool) -> bool:
        """Whether steps of this size find room."""
        return rows <= self.rows and reads <= len(self.out[1]) and (self.found is not None or not works)


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


def _products(layer: Layer) -> tuple[Linear, ...]:
    """In the order in which the kernel takes them."""
    return layer.qkv, layer.out, layer.fc1, layer.fc2


def _packed(layer: Layer) -> list[PackedLinear]:
    return [part for part in _products(layer) if isinstance(part, PackedLinear)]


def _affine(norm: Norm, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a norm that may have neither."""
    weight = torch.ones(width) if norm.weight is None else norm.weight
    return weight, torch.zeros(width) if norm.bias is None else norm.bias
