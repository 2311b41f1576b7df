"""Packed weights on disk. Each machine quantises a model once and memory-maps it afterwards.

Each model has one directory per precision, with one safetensors file per part. Files are memory-mapped and
never changed. They appear by renaming and disappear by unlinking, so existing mappings of other processes
stay valid. docs/decisions/0013-packed-weights.md gives the reasons.
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

# Default limit for the bytes of all models' packed weights.
DEFAULT_LIMIT_BYTES = 16 << 30

_SUFFIX = ".safetensors"
# Directories with this suffix belong to the cache. It never removes anything else.
_MODEL_SUFFIX = ".packed"
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Each tensor begins at a cache line, as in torch's own allocations.
_LINE_BYTES = 64
# An unfinished file older than this belongs to a process that has ended.
_UNFINISHED_SECONDS = 3600.0

_Part = TypeVar("_Part", bound=Part)


def default_directory() -> Path | None:
    """helios/packed in the user's cache directory. None for a user without a home."""
    return user_cache("packed")


class PackedCache:
    """The parts of one model's packed weights. Created for one load, whose threads may all use it.

    A damaged part is logged and counts as missing. If nothing can be written, that is logged and nothing is
    kept. Neither is an error.
    """

    def __init__(self, directory: Path, limit_bytes: int, weights_id: str, model_bytes: int) -> None:
        """directory: of all models. limit_bytes: for all of them together.

        weights_id: identifies this model (`loader.weights_id`). model_bytes: its approximate size.
        """
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._own = directory / (weights_id + _MODEL_SUFFIX)
        self._model_bytes = model_bytes
        self._lock = threading.Lock()
        self._is_usable = True
        self._has_grown = False
        self.bytes_read = 0

    def read(self, name: str, kind: type[_Part]) -> _Part | None:
        """A part, memory-mapped. None when it is missing."""
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
        # A damaged file can contain anything, in its data or in its description.
        except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the packed weights in %s are damaged (%s); they are made anew", file, error)
            return None
        with self._lock:
            self.bytes_read += size
        return part

    def write(self, name: str, part: _Part) -> _Part:
        """Stores a part and returns it mapped, so that later loads share its memory.

        A part that cannot be stored is returned unchanged.
        """
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
        """Stops using the cache in this load, and logs the reason once."""
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
        # The cache leaves free space, because a full disk breaks more than a load.
        if not self._has_grown and shutil.disk_usage(self._own).free < 2 * self._model_bytes:
            raise OSError(errno.ENOSPC, "the model would take more than half of the free space")

    def finish(self, *, is_valid: bool) -> None:
        """Ends the load. If all models together exceed the limit, the least recently used are removed.

        is_valid: whether the checkpoint is unchanged since its id was taken. If not, the parts that this load
        stored are removed.
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
        # Newest first. The model of this load is the newest.
        models = sorted(_models(self._directory), key=lambda model: model.used, reverse=True)
        total = 0
        for model in models:
            total += model.size
            if total > self._limit_bytes and model.path != self._own:
                # Another process may be loading it. Its existing mappings stay valid, and it packs the
                # missing parts itself.
                shutil.rmtree(model.path, ignore_errors=True)
                log.info("%s went: packed weights may take %d bytes", model.path, self._limit_bytes)


@dataclass(frozen=True, slots=True)
class _Model:
    """A directory of packed weights. used: time of last use, as of time.time."""

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
        except OSError:  # Another process removed it.
            continue
        yield _Model(path, size, used)


def _write(file: Path, part: Part) -> None:
    """Writes a part as safetensors. The file appears completely or not at all."""
    structure, tensors = _taken_apart(part)
    # Tensors that fill whole cache lines come first, so that each of them begins at a cache line.
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
    # Not flushed to disk, because a file that a crash cut short fails the checksum.
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
    """Maps a part of a model from its file. Returns the part and the size of the file.

    Raises the errors that `read` treats as damage.
    """
    with file.open("rb") as stream:
        slots, metadata = read_safetensors_header_and_metadata(file)
        # torch needs writable memory. A page is copied only when someone writes to it, and nobody does.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    # The system starts to read the whole file ahead of its first use.
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
    """A part's structure as JSON, and its tensors by their names in the structure."""
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
