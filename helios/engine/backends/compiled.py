"""Runs a model's step, or only its layers, as one compiled call, without Python between the products."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from helios.architectures.spec import LearnedPositions, ModelConfig
from helios.engine.backends.burst import ONE_STEP, Burst
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.paged_attention import addresses_of
from helios.engine.backends.readout import Readout
from helios.engine.kernels import border
from helios.engine.kernels.inner_product import TILE
from helios.engine.kernels.layer import layers_scratch
from helios.engine.kernels.layout import (
    BFLOAT16,
    EMBEDDING,
    EXIT,
    FLOAT16,
    FLOAT32,
    GATE,
    LAYER,
    LAYER_NORM,
    LINEAR,
    MODEL,
    NORM,
    POSITIONS,
    RELU,
    RMS_NORM,
    SUMMARY,
    CacheAddresses,
    Outputs,
    Room,
    Stop,
    record,
)
from helios.engine.kernels.sampling import drawing_numbers
from helios.engine.kernels.step import step_scratch
from helios.engine.kernels.team import TEAM
from helios.engine.scheduling.batch import Batch, Depths
from helios.engine.weights.linear import Linear, PackedLinear
from helios.engine.weights.packed_weights import Ends, Head, Layer, PackedWeights
from helios.engine.weights.parts import Norm

# Readout objects are kept for this many different step sizes.
_KEPT_READOUTS = 256
_PRECISIONS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_NORMS = {"layer": LAYER_NORM, "rms": RMS_NORM}
# By name, and by whether there is a gate.
_ACTIVATIONS = {("relu", False): RELU, ("silu", True): GATE}


class CompiledModel:
    """A model in the form that compiled steps take: records with the addresses of its tensors.

    It keeps these tensors alive. One caller at a time, because all steps share the same work memory.
    """

    def __init__(self, config: ModelConfig, precision: int, weights: PackedWeights) -> None:
        """weights: all linears are packed, in the same precision."""
        self._config, self._weights = config, weights
        self._norms = _Norms(config.hidden_size)
        self._model = _model_record(config, precision, weights.ends)
        self._embed_width = int(self._model["embedding"]["width"][0])
        self._layers = _layer_records(weights.layers, self._norms)
        self._heads = {layer: self._head_record(head) for layer, head in weights.exits.items()}
        self._final = self._head_record(weights.final or Head(None, None))
        self._exits: dict[tuple[int, ...], NDArray[np.void]] = {}
        self._space = _Space.of(0, 0, 0, 0, has_found=False)
        # Memory in which each thread draws tokens, and its size per thread in float32 numbers.
        self._drawing, self._drawing_numbers = torch.empty(0), drawing_numbers(config.vocab_size)

    @classmethod
    def of(cls, config: ModelConfig, weights: PackedWeights) -> Self | None:
        """Returns None if the kernels cannot compute the model."""
        products: list[Linear | None] = [
            *(part for layer in weights.layers for part in (layer.qkv, layer.out, layer.fc1, layer.fc2)),
            *(getattr(weights.ends, name) for name in ("project_in", "project_out", "lm_head")),
            *(head.linear for head in weights.exits.values()),
        ]
        found = [part for part in products if part is not None]
        packed = [part for part in found if isinstance(part, PackedLinear)]
        if (config.activation, config.is_gated) not in _ACTIVATIONS or len(packed) < len(found):
            return None
        (precision,) = {part.precision for part in packed}
        return cls(config, precision, weights)

    def step(self, batch: Batch, cache: KVCache, depth: int, burst: Burst) -> Readout:
        """Runs the first `depth` layers, writes the KV of all rows, and reads out the rows that need it.

        After several steps the logits are those of the last step. All other results cover all steps in order.
        The result is valid until the next call.
        """
        steps = self._run(batch, cache, self._exits_of((depth,)), ((depth, 0),), burst)
        return self._space.read(batch.reads, steps)

    def step_with_states(self, batch: Batch, cache: KVCache, depth: int) -> tuple[Readout, torch.Tensor]:
        """Like `step`. Also returns the states of all rows after these layers, as valid as the readout."""
        found = self.step(batch, cache, depth, ONE_STEP)
        # The states of all rows are the first part of the work space.
        rows, width = batch.rows, self._config.hidden_size
        return found, self._space.scratch[: 4 * rows * width].view(torch.float32).view(rows, width)

    def step_mixed(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """Like `step`, but each row leaves at its own depth (`Batch.depths`).

        Also returns the exit layer of each row that is read.
        """
        depths = batch.depths
        if len(depths) == 1:
            depth = depths[0][0]
            steps = self._run(batch, cache, self._exits_of((depth,)), depths, burst)
            return self._space.read(batch.reads, steps), [depth] * (steps * batch.reads)
        exits = self._exits_of(tuple(depth for depth, _ in depths))
        exits["staying"] = [staying for _, staying in depths]
        return self._with_exit_layers(batch, self._run(batch, cache, exits, depths, burst))

    def step_dynamic(
        self, batch: Batch, cache: KVCache, thresholds: Mapping[int, float], burst: Burst
    ) -> tuple[Readout, list[int]]:
        """Runs all layers. A decode row leaves at the first exit whose threshold it reaches.

        Also returns the exit layer of each row that is read. Several steps and validity are as in `step`.
        """
        depth = len(self._layers)
        before = sorted(layer for layer in thresholds if layer < depth)
        exits = self._exits_of((*before, depth))
        exits["threshold"][:-1] = [thresholds[layer] for layer in before]
        steps = self._run(batch, cache, exits, ((depth, 0),), burst, is_dynamic=True)
        return self._with_exit_layers(batch, steps)

    def layers(
        self, hidden: torch.Tensor, batch: Batch, cache: KVCache, first: int, last: int
    ) -> torch.Tensor:
        """Runs the layers first..last on hidden, float32 [T, hidden], and writes the rows' KV."""
        scratch = torch.empty(layers_scratch(self._model[0], batch.rows), dtype=torch.uint8)
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        TEAM.run(
            border.call_layers,
            self._model,
            self._layers,
            first,
            last,
            hidden.data_ptr(),
            tuple(addresses_of(batch)),
            _cache_addresses(cache),
            scratch.data_ptr(),
            operations=(last - first) * batch.rows * self._operations(batch),
        )
        return hidden

    def _run(
        self,
        batch: Batch,
        cache: KVCache,
        exits: NDArray[np.void],
        depths: Depths,
        burst: Burst,
        *,
        is_dynamic: bool = False,
    ) -> int:
        """Returns the number of steps taken.

        exits: EXIT [E], ascending; depths: as in `Batch.depths`, in a dynamic step as if no row left early.
        """
        rows, reads = batch.rows, batch.reads
        space = self._space_for(rows, burst.steps * reads, has_found=is_dynamic and len(exits) > 1)
        if len(burst.draws.rows) and len(self._drawing) < TEAM.threads * self._drawing_numbers:
            self._drawing = torch.empty(TEAM.threads * self._drawing_numbers)
        # Number of layers, summed over the rows.
        layers = before = 0
        for depth, staying in depths:
            layers, before, rows = layers + (depth - before) * rows, depth, staying
        interrupt = 0 if burst.interrupt is None else burst.interrupt.address
        TEAM.run(
            border.call_burst,
            burst.steps,
            self._model,
            self._layers,
            exits,
            is_dynamic,
            _cache_addresses(cache),
            tuple(addresses_of(batch)),
            tuple(burst.draws),
            tuple(Stop(interrupt, burst.last_tokens)),
            tuple(Room(space.scratch_address, self._drawing.data_ptr(), space.found, space.out)),
            operations=layers * self._operations(batch) + reads * self._embed_width * self._config.vocab_size,
        )
        return burst.steps if burst.interrupt is None else burst.interrupt.steps_of(burst.steps)

    def _with_exit_layers(self, batch: Batch, steps: int) -> tuple[Readout, list[int]]:
        exit_layers = self._space.exit_layers[: steps * batch.reads]
        return self._space.read(batch.reads, steps), exit_layers.tolist()

    def _space_for(self, rows: int, reads: int, *, has_found: bool) -> "_Space":
        """Memory for steps of this size. reads: rows read in all steps of a burst together."""
        space = self._space
        if not space.holds(rows, reads, has_found=has_found):
            # Never smaller than before: prompts and bursts alternate, and each needs its own maximum.
            rows, reads = max(rows, space.rows), max(reads, space.reads)
            self._space = _Space.of(
                rows,
                reads,
                step_scratch(self._model[0], rows),
                self._config.vocab_size,
                has_found=has_found or space.has_found,
            )
        return self._space

    def _exits_of(self, layers: tuple[int, ...]) -> NDArray[np.void]:
        """EXIT records of these layers. They are kept, and each call says anew which rows leave where."""
        if layers not in self._exits:
            found = np.zeros(len(layers), dtype=EXIT)
            for index, layer in enumerate(layers):
                found[index] = self._heads.get(layer, self._final)[0]
            found["layer"] = layers
            self._exits[layers] = found
        return self._exits[layers]

    def _head_record(self, head: Head) -> NDArray[np.void]:
        """An EXIT record of only an exit's head."""
        norm = record(NORM) if head.norm is None else self._norms.record(head.norm)
        return record(EXIT, norm=norm, linear=_linear_record(head.linear))

    def _operations(self, batch: Batch) -> int:
        """Approximate number of multiply-adds of one layer for one row."""
        products = sum(channels * inputs for channels, inputs in self._config.layer_products)
        return products + 2 * self._config.query_size * batch.width * batch.block_tokens


class _Norms:
    """The parameters of norms, which may lack a weight or a bias. Keeps their tensors alive."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._kept: list[torch.Tensor] = []

    def record(self, norm: Norm) -> NDArray[np.void]:
        weight = torch.ones(self._width) if norm.weight is None else norm.weight
        bias = torch.zeros(self._width) if norm.bias is None else norm.bias
        self._kept += [weight, bias]
        return record(NORM, weight=weight.data_ptr(), bias=bias.data_ptr())


class _Space(NamedTuple):
    """Memory for steps of at most `rows` rows and `reads` reads: work space and results."""

    rows: int
    reads: int
    # Whether `found` has memory of its own.
    has_found: bool
    scratch: torch.Tensor
    scratch_address: int
    # The results: the tensors of a `Readout`, and the exit layers.
    logits: torch.Tensor
    best: torch.Tensor
    summaries: torch.Tensor
    exit_layers: torch.Tensor
    # Addresses, as in `Room`.
    found: tuple[int, ...]
    out: tuple[int, ...]
    # The tensors behind `found`: those of `out` unless `has_found`.
    kept: tuple[torch.Tensor, ...]
    # Readouts made earlier, by (reads, steps).
    readouts: dict[tuple[int, int], Readout]

    @classmethod
    def of(cls, rows: int, reads: int, scratch_bytes: int, vocabulary: int, *, has_found: bool) -> Self:
        """reads: in all steps of a burst. Steps with many rows read few, so most pages stay unused."""
        reads = max(rows, reads)

        def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
            return (
                torch.empty(rows, vocabulary),
                torch.empty(reads, dtype=torch.int64),
                torch.empty(reads, SUMMARY),
                torch.empty(reads, dtype=torch.int64),
            )

        out = tensors()
        found = tensors() if has_found else out
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8)
        return cls(
            rows,
            reads,
            has_found,
            scratch,
            scratch.data_ptr(),
            *out,
            found=_addresses(found),
            out=_addresses(out),
            kept=found,
            readouts={},
        )

    def read(self, reads: int, steps: int) -> Readout:
        """The readout of `steps` steps of `reads` reads each. Kept, because sizes mostly repeat."""
        key = reads, steps
        if key not in self.readouts:
            if len(self.readouts) >= _KEPT_READOUTS:
                self.readouts.clear()
            best, summaries = self.best[: steps * reads], self.summaries[: steps * reads]
            host = best.numpy(), summaries.numpy()
            self.readouts[key] = Readout(self.logits[:reads], best, summaries, host)
        return self.readouts[key]

    def holds(self, rows: int, reads: int, *, has_found: bool) -> bool:
        """Whether there is room for steps of this size."""
        return rows <= self.rows and reads <= self.reads and (self.has_found or not has_found)


def _addresses(outputs: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    """Addresses of logits, best, summaries and exit layers, in the order that kernels expect."""
    return tuple(Outputs(*(tensor.data_ptr() for tensor in outputs)))


def _cache_addresses(cache: KVCache) -> tuple[Any, ...]:
    """A cache in the form that kernels take."""
    return tuple(CacheAddresses(*cache.addresses, cache.block_tokens))


def _model_record(config: ModelConfig, precision: int, ends: Ends) -> NDArray[np.void]:
    return record(
        MODEL,
        precision=precision,
        width=config.hidden_size,
        qkv_width=config.query_size + 2 * config.kv_size,
        ffn_width=config.ffn_dim,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        norm=_NORMS[config.norm],
        norm_before=config.norm_before,
        epsilon=config.norm_epsilon,
        rotation=0 if ends.rotation is None else ends.rotation.data_ptr(),
        activation=_ACTIVATIONS[config.activation, config.is_gated],
        embedding=_embedding_record(ends),
        positions=_positions_record(config, ends),
        project_in=_linear_record(ends.project_in),
        project_out=_linear_record(ends.project_out),
        lm_head=_linear_record(ends.lm_head),
    )


def _positions_record(config: ModelConfig, ends: Ends) -> NDArray[np.void]:
    table, learned = ends.embed_positions, config.positions
    if table is None or not isinstance(learned, LearnedPositions):
        return record(POSITIONS)
    precision = _PRECISIONS[table.dtype]
    return record(POSITIONS, table=table.data_ptr(), precision=precision, offset=learned.offset)


def _embedding_record(ends: Ends) -> NDArray[np.void]:
    if ends.embed_tokens is not None:
        table, width = ends.embed_tokens, ends.embed_tokens.shape[1]
        lies = {"tile_tokens": 1, "tile_numbers": width, "word_numbers": width}
    else:
        assert isinstance(ends.lm_head, PackedLinear)
        # [tiles, words, tokens of a tile, numbers of a word]
        table, width = ends.lm_head.tensors[0], ends.lm_head.in_size
        lies = {"tile_tokens": TILE, "tile_numbers": table[0].numel(), "word_numbers": table.shape[3]}
    return record(EMBEDDING, table=table.data_ptr(), precision=_PRECISIONS[table.dtype], width=width, **lies)


def _layer_records(layers: Sequence[Layer], norms: _Norms) -> NDArray[np.void]:
    found = np.zeros(len(layers), dtype=LAYER)
    for index, layer in enumerate(layers):
        for name in LAYER.names or ():
            part = getattr(layer, name)
            if part is not None:
                made = norms.record(part) if isinstance(part, Norm) else _linear_record(part)
                found[name][index] = made[0]
    return found


def _linear_record(linear: Linear | None) -> NDArray[np.void]:
    return linear.record if isinstance(linear, PackedLinear) else record(LINEAR)
