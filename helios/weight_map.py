"""Finds a checkpoint's tensors: its weight files and, in safetensors, the bytes of each tensor.

Reads only headers and indexes, no weights. Does not import torch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios.errors import CheckpointError
from helios.json_object import read_json_object

# In the order in which transformers looks for these files.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"

_LENGTH_BYTES = 8
# The limit of the format (safetensors, MAX_HEADER_SIZE).
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A tensor's place in a safetensors file: bytes start..end of the file."""

    dtype: str  # name of the type in safetensors, such as F32 or BF16
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightMap:
    """A checkpoint's weight files. `file_of` maps tensor names to files. None: one file holds all tensors."""

    files: tuple[Path, ...]
    file_of: Mapping[str, Path] | None

    @property
    def is_safetensors(self) -> bool:
        """True for safetensors, False for pickles."""
        return self.files[0].suffix == ".safetensors"

    @classmethod
    def read(cls, path: Path) -> "WeightMap":
        """The weight files of a checkpoint directory. Safetensors are preferred to pickles.

        Raises CheckpointError when there are none, or when a shard named in the index is missing.
        """
        for name in SINGLE_FILES:
            if (path / name).is_file():
                return cls((path / name,), None)
            index = path / (name + INDEX_SUFFIX)
            if index.is_file():
                return _read_index(index)
        raise CheckpointError(
            f"{path} holds no weights: none of {', '.join(SINGLE_FILES)}, whole or sharded with "
            f"{INDEX_SUFFIX}; fetch them"
        )


def _read_index(index: Path) -> WeightMap:
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map must map tensor names to files; fetch it again")
    file_of = {}
    for tensor, name in names.items():
        # A checkpoint must not refer to files outside its own directory.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {tensor} lies in {name!r}, which is not a plain file name")
        file_of[tensor] = index.parent / name
    files = tuple(sorted(set(file_of.values())))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing though {index.name} names it; fetch it")
    return WeightMap(files, file_of)


def read_safetensors_header(file: Path) -> dict[str, TensorSlot]:
    """Every tensor of a safetensors file, by name. Format: github.com/huggingface/safetensors.

    Raises CheckpointError naming the file when it is missing, truncated or malformed.
    """
    return read_safetensors_header_and_metadata(file)[0]


def read_safetensors_header_and_metadata(file: Path) -> tuple[dict[str, TensorSlot], dict[str, Any]]:
    """A safetensors file's tensors, and its writer's metadata. Raises as `read_safetensors_header`."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is truncated or no safetensors file; fetch it again")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; fetch it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable safetensors header ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: malformed safetensors header; fetch it again")
    begin = _LENGTH_BYTES + length
    slots = {
        name: _slot(file, name, entry, begin) for name, entry in header.items() if name != "__metadata__"
    }
    end = max((slot.end for slot in slots.values()), default=begin)
    if end > size:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes where its header asks for {end}; fetch it again"
        )
    metadata = header.get("__metadata__", {})
    return slots, metadata if isinstance(metadata, dict) else {}


def _slot(file: Path, name: str, entry: Any, begin: int) -> TensorSlot:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
        valid = whole and start <= end
        if valid and dtype in _ITEM_BYTES:
            valid = end - start == math.prod(shape) * _ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{file}: malformed safetensors header at {name}; fetch it again")
    return TensorSlot(dtype, shape, begin + start, begin + end)
