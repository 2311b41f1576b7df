"""Reads weight files, safetensors and pickles, a few rows at a time."""

import math
import os
import pickle
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from helios.errors import CheckpointError, OutOfMemoryError
from helios.weight_map import read_safetensors_header

CPU = torch.device("cpu")
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Size of the buffer through which tensors are read, so that converting their type never doubles a tensor.
_BUFFER_BYTES = 4 << 20


class WeightFile(Protocol):
    """An open weight file. Several threads may read it at once."""

    # Bytes of weights read so far. A pickle in the old format counts completely.
    bytes_read: int

    @property
    def names(self) -> frozenset[str]:
        """Its tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        ...

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's rows in blocks, in their stored type. A block is valid until the next one is requested.

        Raises CheckpointError, OutOfMemoryError.
        """
        ...

    def is_alias(self, name: str, other: str) -> bool:
        """Whether both names refer to the same stored bytes, as tied weights may."""
        ...

    def close(self) -> None:
        """Closes the file and drops its mappings."""
        ...


def open_weight_file(file: Path) -> WeightFile:
    """Opens a file, whose name tells the format. Raises CheckpointError."""
    return SafetensorsFile(file) if file.suffix == ".safetensors" else PickleFile(file)


class SafetensorsFile:
    """A safetensors file, read with ordinary reads.

    It is not memory-mapped: mapped pages would count as resident memory beside the copies, and a mapped file
    that shrinks kills the process instead of raising an error.
    """

    def __init__(self, file: Path) -> None:
        """Raises CheckpointError naming the file."""
        self._file = file
        self._slots = read_safetensors_header(file)
        self._stream = file.open("rb", buffering=0)
        self._own = threading.local()
        self._lock = threading.Lock()
        self.bytes_read = 0

    @property
    def names(self) -> frozenset[str]:
        """Names of its tensors."""
        return frozenset(self._slots)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._slots[name].shape

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's rows in blocks (`WeightFile.blocks`)."""
        slot = self._slots[name]
        stored = _SAFETENSORS_DTYPES.get(slot.dtype)
        if stored is None:
            raise _unsupported(self._file, name, slot.dtype)
        rows, row_bytes = slot.shape[0], stored.itemsize * math.prod(slot.shape[1:])
        buffer, at_once = self._buffer(row_bytes), max(1, _BUFFER_BYTES // row_bytes)
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            raw = buffer[: count * row_bytes]
            self._fill(raw, slot.start + start * row_bytes, name)
            yield raw.view(stored).view(count, *slot.shape[1:])
        with self._lock:
            self.bytes_read += slot.end - slot.start

    def is_alias(self, name: str, other: str) -> bool:
        """Whether both names refer to the same stored bytes."""
        slot = self._slots.get(name)
        return slot is not None and slot == self._slots.get(other)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()
        self._own = threading.local()

    def _buffer(self, row_bytes: int) -> torch.Tensor:
        """The calling thread's own buffer, which holds at least one row."""
        found = getattr(self._own, "buffer", None)
        if not isinstance(found, torch.Tensor) or len(found) < row_bytes:
            found = self._own.buffer = allocate((max(_BUFFER_BYTES, row_bytes),), torch.uint8, CPU)
        return found

    def _fill(self, raw: torch.Tensor, offset: int, name: str) -> None:
        view = raw.numpy().data
        while view:
            try:
                count = os.preadv(self._stream.fileno(), [view], offset)
            except OSError as error:
                raise CheckpointError(f"{self._file} cannot be read at {name}: {error}") from error
            if not count:
                raise CheckpointError(f"{self._file} ends inside {name}; fetch it again")
            view, offset = view[count:], offset + count


class PickleFile:
    """A pytorch_model.bin: memory-mapped if it is a zip (torch 1.6 and later), else read completely.

    Only tensors are unpickled (`weights_only`), so a hostile file cannot run code.
    """

    def __init__(self, file: Path) -> None:
        """Raises CheckpointError naming the file."""
        self._file = file
        self._lock = threading.Lock()
        self._tensors, self._is_mapped = _unpickle(file)
        self.bytes_read = 0 if self._is_mapped else file.stat().st_size

    @property
    def names(self) -> frozenset[str]:
        """Names of its tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._tensors[name].shape)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's rows in blocks (`WeightFile.blocks`)."""
        stored = self._tensors[name]
        if stored.dtype not in _SAFETENSORS_DTYPES.values():
            raise _unsupported(self._file, name, str(stored.dtype))
        yield from stored.split(max(1, _BUFFER_BYTES // stored[0].nbytes))
        if self._is_mapped:
            with self._lock:
                self.bytes_read += stored.nbytes

    def is_alias(self, name: str, other: str) -> bool:
        """Whether both names refer to the same stored bytes."""
        one, two = self._tensors.get(name), self._tensors.get(other)
        if one is None or two is None:
            return False
        return one.data_ptr() == two.data_ptr() and one.shape == two.shape

    def close(self) -> None:
        """Releases the mapped or read contents."""
        self._tensors = {}


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor with uninitialised contents. Raises OutOfMemoryError."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    except RuntimeError as error:
        raise OutOfMemoryError(
            f"no memory for a tensor of shape {list(shape)} as {dtype} on {device}; "
            "load fewer layers or a smaller model"
        ) from error


def _unsupported(file: Path, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {name} is stored as {dtype}; Helios reads float32, float16, bfloat16 and float64 weights"
    )


def _unpickle(file: Path) -> tuple[Mapping[str, torch.Tensor], bool]:
    """The tensors of a pickle, and whether they are memory-mapped."""
    try:
        is_mapped = zipfile.is_zipfile(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; fetch it") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is corrupt, or holds Python objects beside tensors; it was not loaded, since these "
            "could run code. Get the model as safetensors, or fetch it again"
        ) from error
    # Damaged bytes can make the unpickler raise nearly anything.
    except Exception as error:
        raise CheckpointError(f"{file} is corrupt or truncated ({error}); fetch it again") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{file} does not map names to tensors; fetch it again")
    return tensors, is_mapped
