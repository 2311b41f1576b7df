"""Packed weights on disk: each machine quantises a model once and maps it from then on.

Each model has a directory for each precision, and in it a safetensors file for each of its parts. Files are
mapped and never changed. They appear by renaming and go by unlinking, which leaves the mappings of others as
they are. docs/decisions/0013-packed-weights.md says why.
"""

import errno
import json
import logging
import mmap
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from helios.engine.weights.linear import PackedLinear
from helios.engine.weights.packed_weights import Part
from helios.engine.weights.parts import Norm
from helios.errors import CheckpointError
from helios.user_cache import user_cache
from helios.weight_map import read_safetensors_header_and_metadata

log = logging.getLogger(__name__)

# Bytes that all models' packed weights may take.
DEFAULT_LIMIT_BYTES = 16 << 30

_SUFFIX = ".safetensors"
# Directories with this suffix are the cache's own. It never removes anything else.
_MODEL_SUFFIX = ".packed"
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Tensors begin at a cache line of their own, as torch allocates them.
_LINE_BYTES = 64
# An unfinished file older than this belongs to a process that is gone.
_UNFINISHED_SECONDS = 3600.0

_Part = TypeVar("_Part", bound=Part)


def default_directory() -> Path | None:
    """helios/packed in the user's cache directory; None for a user without a home."""
    return user_cache("packed")


class PackedCache:
    """The parts of one model's packed weights. Made for one load, whose threads may all use it.

    A damaged part is logged and reads as missing. Where nothing can be written, that is logged and nothing is
    kept. Neither is an error.
    """

    def __init__(self, directory: Path, limit_bytes: int, weights_id: str, model_bytes: int) -> None:
        """directory: of all models. limit_bytes: what they may take together. weights_id: names this model
        (`loader.weights_id`). model_bytes: about what it takes."""
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._own = directory / (weights_id + _MODEL_SUFFIX)
        self._model_bytes = model_bytes
        self._lock = threading.Lock()
        self._is_usable = True
        self._has_grown = False
        self.bytes_read = 0

    def read(self, name: str, kind: type[_Part]) -> _Part | None:
        """A part, mapped; None when it is not there."""
        if not self._is_usable:
            return None
        file = self._own / (name + _SUFFIX)
        try:
            part, size = _map(file, kind)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._give_up(error)
            return None
        # A damaged file can hold anything, in its bytes or in what describes them.
        except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the packed weights in %s are damaged (%s); they are made anew", file, error)
            return None
        with self._lock:
            self.bytes_read += size
        return part

    def write(self, name: str, part: _Part) -> _Part:
        """Stores a part and returns it mapped, so that later loads share its memory. A part that cannot be
        stored is returned as it was."""
        if not self._is_usable:
            return part
        file = self._own / (name + _SUFFIX)
        try:
            self._make_directory()
            _write(file, part)
            mapped, _ = _map(file, type(part), check=False)
        except OSError as error:
            self._give_up(error)
            return part
        self._has_grown = True
        return mapped

    def _give_up(self, error: OSError) -> None:
        """Uses the cache no more in this load, and logs why, once."""
        with self._lock:
            if self._is_usable:
                self._is_usable = False
                log.warning(
                    "packed weights cannot be kept in %s (%s): each load makes them anew. Make room there, "
                    "choose another packed_cache_dir, or set packed_cache_bytes to 0",
                    self._directory,
                    error,
                )

    def _make_directory(self) -> None:
        self._own.mkdir(parents=True, exist_ok=True)
        # A cache leaves room to others: a full disk fails more than a load.
        if not self._has_grown and shutil.disk_usage(self._own).free < 2 * self._model_bytes:
            raise OSError(errno.ENOSPC, "the model would take more than half of the free space")

    def finish(self, *, is_valid: bool) -> None:
        """Ends the load. If all models now exceed the limit, those used longest ago are removed.

        is_valid: the checkpoint is still what it was when its id was taken. If not, what this load stored of
        it is removed.
        """
        try:
            if self._has_grown and not is_valid:
                shutil.rmtree(self._own)
                return
            os.utime(self._own)
            if self._has_grown:
                self._trim()
        except OSError as error:
            log.debug("nothing is tidied in %s: %s", self._directory, error)

    def _trim(self) -> None:
        # Newest first. This load's model is the newest.
        models = sorted(_models(self._directory), key=lambda model: model.used, reverse=True)
        total = 0
        for model in models:
            total += model.size
            if total > self._limit_bytes and model.path != self._own:
                # Another process may be loading it: what it has mapped stays, and it packs what it misses.
                shutil.rmtree(model.path, ignore_errors=True)
                log.info("%s went: packed weights may take %d bytes", model.path, self._limit_bytes)


@dataclass(frozen=True, slots=True)
class _Model:
    """A directory of packed weights. used: as of time.time."""

    path: Path
    size: int
    used: float


def _models(directory: Path) -> Iterator[_Model]:
    for path in directory.glob(f"*{_MODEL_SUFFIX}"):
        try:
            used, size = path.stat().st_mtime, 0
            for file in path.iterdir():
                facts = file.stat()
                if file.suffix == _SUFFIX or facts.st_mtime > time.time() - _UNFINISHED_SECONDS:
                    size += facts.st_size
                else:
                    file.unlink()
        except OSError:  # Another process has removed it.
            continue
        yield _Model(path, size, used)


def _write(file: Path, part: Part) -> None:
    """Writes a part as safetensors. Either the whole file appears or none."""
    structure, tensors = _taken_apart(part)
    # Tensors that fill whole cache lines come first, so that each begins at one.
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % _LINE_BYTES, -tensors[name].itemsize))
    described = json.dumps(structure)
    check, offset, header = zlib.crc32(described.encode()), 0, dict[str, Any]()
    for name in names:
        tensor = tensors[name]
        check = zlib.crc32(_bytes(tensor), check)
        end = offset + tensor.nbytes
        dtype = _NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"structure": described, "crc32": str(check)}} | header).encode()
    text += b" " * (-(len(text) + 8) % _LINE_BYTES)
    # It is not flushed to the disk: a file that a crash cut short fails the checksum.
    unfinished = file.with_name(f"{file.stem}-{uuid.uuid4().hex[:8]}.part")
    try:
        with unfinished.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                stream.write(_bytes(tensors[name]))
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _map(file: Path, kind: type[_Part], *, check: bool = True) -> tuple[_Part, int]:
    """Maps a part of a model from its file; returns it and the file's size. Raises what `read` takes for
    damage."""
    with file.open("rb") as stream:
        slots, metadata = read_safetensors_header_and_metadata(file)
        # torch asks for writable memory. Pages are copied when somebody writes, which nobody does.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    # Has all of it read ahead of its first use.
    mapped.madvise(mmap.MADV_WILLNEED)
    described = metadata["structure"]
    tensors, actual = {}, zlib.crc32(described.encode())
    for name, slot in slots.items():
        count = (slot.end - slot.start) // _DTYPES[slot.dtype].itemsize
        flat = torch.frombuffer(mapped, dtype=_DTYPES[slot.dtype], count=count, offset=slot.start)
        tensors[name] = flat.view(slot.shape)
        if check:
            actual = zlib.crc32(_bytes(flat), actual)
    if check and actual != int(metadata["crc32"]):
        raise CheckpointError("its checksum is another")
    return _put_together(kind, json.loads(described), tensors), len(mapped)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _taken_apart(part: Part) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A part's structure as JSON, and its tensors by the names that the structure uses."""
    tensors: dict[str, torch.Tensor] = {}

    def named(name: str, tensor: torch.Tensor | None) -> str | None:
        if tensor is None:
            return None
        tensors[name] = tensor
        return name

    structure: dict[str, Any] = {}
    for field in fields(part):
        name, value = field.name, getattr(part, field.name)
        if value is None or isinstance(value, torch.Tensor):
            structure[name] = named(name, value)
        elif isinstance(value, Norm):
            structure[name] = [named(f"{name}.weight", value.weight), named(f"{name}.bias", value.bias)]
        elif isinstance(value, PackedLinear):
            structure[name] = {
                "numbers": value.precision,
                "out_size": value.out_size,
                "in_size": value.in_size,
                "tensors": [named(f"{name}.{index}", one) for index, one in enumerate(value.tensors)],
            }
        else:
            raise TypeError(f"{name} is a {type(value).__name__}, which is not packed")
    return structure, tensors


def _put_together(
    kind: type[_Part], structure: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> _Part:
    def made(value: Any) -> torch.Tensor | Norm | PackedLinear | None:
        if value is None or isinstance(value, str):
            return None if value is None else tensors[value]
        if isinstance(value, list):
            weight, bias = (None if name is None else tensors[name] for name in value)
            return Norm(weight, bias)
        own = [tensors[name] for name in value["tensors"]]
        return PackedLinear(value["numbers"], value["out_size"], value["in_size"], own)

    values: dict[str, Any] = {name: made(value) for name, value in structure.items()}
    return kind(**values)
