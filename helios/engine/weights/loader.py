"""Loads a partial model from the running model, from packed weights on disk, or from the checkpoint."""

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

from helios.architectures.registry import architecture_of
from helios.catalog import ModelEntry, checkpoint_id
from helios.engine.threads import loading_threads
from helios.engine.weights.checkpoint import Checkpoint
from helios.engine.weights.linear import LAYOUT_VERSION, linear
from helios.engine.weights.packed_cache import PackedCache, default_directory
from helios.engine.weights.packed_weights import (
    Ends,
    Head,
    Layer,
    PackedWeights,
    Part,
    pack_layer,
    pack_norm,
    pack_optional,
)
from helios.engine.weights.part_reader import PartReader
from helios.engine.weights.parts import LinearWeights
from helios.engine.weights.precision import checkpoint_dtype
from helios.engine.weights.quantize import quantize
from helios.engine.weights.rotation import rotation
from helios.footprint import weight_bytes
from helios.modes import Precision

# Mapping takes at most a third of the time of packing. For smaller models it saves less than a tenth of a
# second.
MIN_CACHED_BYTES = 64 << 20

_Part = TypeVar("_Part", bound=Part)


def load_packed(
    entry: ModelEntry,
    depth: int,
    exits: Sequence[int],
    precision: Precision,
    device: torch.device,
    *,
    cache_dir: Path | None = None,
    cache_bytes: int = 0,
    running: PackedWeights | None = None,
    beside_serving: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackedWeights:
    """The first `depth` layers, ready to compute in `precision`, with the heads of `exits`.

    Each part comes from its fastest source: the running plan, the packed cache, or the checkpoint. No other
    part of the checkpoint is read.

    running: shares parts of the same weights. cache_dir: directory of packed weights; None means
    `packed_cache.default_directory`. cache_bytes: limit for all models there; 0 means that nothing is kept.
    beside_serving: load with one low-priority thread instead of one per core. progress: called in the
    caller's thread after each layer.

    Raises UnknownDepthError naming the valid depths, CheckpointError naming file and tensor,
    OutOfMemoryError.
    """
    entry.facts.check_exits(exits, depth, entry.name)
    with (
        _Source(entry, precision, device, running, cache_dir, cache_bytes) as source,
        loading_threads(beside_serving) as threads,
    ):
        ends = threads.submit(source.ends)
        loading = [threads.submit(source.layer, index) for index in range(depth)]
        layers = []
        for layer in loading:
            layers.append(layer.result())
            if progress is not None:
                progress(len(layers), depth)
        own = [layer for layer in exits if entry.facts.has_own_head(layer)]
        heads = {layer: source.head(layer, ends.result()) for layer in own}
        final = source.final(ends.result()) if len(own) < len(exits) else None
        return PackedWeights(
            id=source.id,
            checkpoint_id=source.checkpoint_id,
            precision=precision.value,
            ends=ends.result(),
            layers=layers,
            final=final,
            exits=heads,
            bytes_read=source.bytes_read,
        )


def weights_id(entry: ModelEntry, checkpoint: str, precision: Precision, device: torch.device) -> str:
    """An id that changes with the checkpoint, the precision, the device and the packed format."""
    facts = f"{checkpoint} {device} {LAYOUT_VERSION}"
    return f"{entry.name}-{precision}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


class _Source:
    """The parts of a model, each from its fastest source. Several threads may use it at once."""

    def __init__(
        self,
        entry: ModelEntry,
        precision: Precision,
        device: torch.device,
        running: PackedWeights | None,
        cache_dir: Path | None,
        cache_bytes: int,
    ) -> None:
        self._entry, self._precision, self._device = entry, precision, device
        # Computed before anything is read: if the files change meanwhile, the id no longer matches the
        # checkpoint.
        self.checkpoint_id = checkpoint_id(entry)
        self.id = weights_id(entry, self.checkpoint_id, precision, device)
        self._running = running if running is not None and running.id == self.id else None
        packed_bytes = weight_bytes(entry.config, precision)
        self._cache = None
        directory = cache_dir or default_directory()
        # Weights are packed only on a CPU, and never in float16.
        is_packed = device.type == "cpu" and precision is not Precision.FLOAT16
        if is_packed and directory is not None and MIN_CACHED_BYTES <= packed_bytes <= cache_bytes:
            self._cache = PackedCache(directory, cache_bytes, self.id, packed_bytes)
        self._lock = threading.Lock()
        self._opened: PartReader | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._opened is not None:
            self._opened.checkpoint.close()
        if self._cache is not None:
            self._cache.finish(is_valid=self._is_unchanged())

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far, from the checkpoint and from the packed cache."""
        read = 0 if self._opened is None else self._opened.checkpoint.bytes_read
        return read + (0 if self._cache is None else self._cache.bytes_read)

    def ends(self) -> Ends:
        if self._running is not None:
            return self._running.ends

        def pack() -> Ends:
            reader = self._reader()
            embed_tokens = reader.embed_tokens()
            head, scales = reader.lm_head(embed_tokens), None
            is_same = head is embed_tokens and self._precision is not Precision.INT8
            if self._precision is Precision.INT8:
                head, scales = quantize(head)
            return Ends(
                embed_tokens=None if is_same else embed_tokens,
                embed_positions=reader.embed_positions(),
                rotation=rotation(self._entry.config, self._device),
                project_in=pack_optional(reader.project_in()),
                project_out=pack_optional(reader.project_out()),
                lm_head=linear(LinearWeights(head, None, scales)),
            )

        return self._kept("ends", Ends, pack)

    def layer(self, index: int) -> Layer:
        if self._running is not None and index < len(self._running.layers):
            return self._running.layers[index]
        return self._kept(f"layer-{index}", Layer, lambda: pack_layer(self._reader().layer(index)))

    def final(self, ends: Ends) -> Head:
        if self._running is not None and self._running.final is not None:
            return self._running.final

        def pack() -> Head:
            norm = self._reader().final_norm()
            return Head(None if norm is None else pack_norm(norm, ends.lm_head), None)

        return self._kept("final", Head, pack)

    def head(self, exit_layer: int, ends: Ends) -> Head:
        if self._running is not None and exit_layer in self._running.exits:
            return self._running.exits[exit_layer]

        def pack() -> Head:
            head = self._reader().exit_head(self._entry.facts, exit_layer)
            return Head(pack_norm(head.norm, ends.lm_head), pack_optional(head.linear))

        return self._kept(f"exit-{exit_layer}", Head, pack)

    def _kept(self, name: str, kind: type[_Part], pack: Callable[[], _Part]) -> _Part:
        found = None if self._cache is None else self._cache.read(name, kind)
        if found is None:
            found = pack() if self._cache is None else self._cache.write(name, pack())
            _give_back_memory()
        return found

    def _reader(self) -> PartReader:
        """Opens the checkpoint when its first part is needed."""
        with self._lock:
            if self._opened is None:
                config = self._entry.config
                names = architecture_of(config).names
                self._opened = PartReader(
                    Checkpoint(self._entry.path, names.prefixes),
                    config,
                    names,
                    checkpoint_dtype(self._precision),
                    self._device,
                    is_quantized=self._precision is Precision.INT8,
                )
            return self._opened

    def _is_unchanged(self) -> bool:
        try:
            return checkpoint_id(self._entry) == self.checkpoint_id
        except OSError:
            return False


def _give_back_memory() -> None:
    """Returns memory freed while packing to the system.

    Otherwise glibc would keep it wherever it lies between weights that stay: a fifth of the size of the
    weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
