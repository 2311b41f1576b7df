"""Reads a model directory's tensors by name, from whichever files hold them."""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from helios.catalog import EXITS_FILE, FACTS_FILE
from helios.engine.weights.weight_files import CPU, WeightFile, allocate, open_weight_file
from helios.errors import CheckpointError
from helios.weight_map import WeightMap


class Checkpoint:
    """The weights of a model directory, read tensor by tensor. Use it in `with`, or close it.

    Each name is tried with each of the architecture's prefixes (`TensorNames.prefixes`). Several threads may
    read at once. A file is opened when one of its tensors is first needed.
    """

    def __init__(self, path: Path, prefixes: Sequence[str]) -> None:
        """Raises CheckpointError naming the weight file that is missing or corrupt."""
        self.path = path
        self._prefixes = prefixes
        self._lock = threading.Lock()
        self._open: dict[Path, WeightFile] = {}
        weights = WeightMap.read(path)
        if weights.file_of is None:
            file = weights.files[0]
            self._file_of: dict[str, Path] = dict.fromkeys(self._opened(file).names, file)
        else:
            self._file_of = dict(weights.file_of)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far (`WeightFile.bytes_read`)."""
        return sum(file.bytes_read for file in self._open.values())

    def add_exits(self) -> None:
        """Makes the exit heads' tensors available too. Raises CheckpointError for an unreadable file."""
        file = self.path / EXITS_FILE
        if not file.is_file():
            raise CheckpointError(f"{file} is missing though {FACTS_FILE} says exits have heads; fetch it")
        self._file_of.update(dict.fromkeys(self._opened(file).names, file))

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def check_absent(self, name: str) -> None:
        """Raises CheckpointError if there is a tensor that config.json does not describe."""
        stored = self._stored_name(name)
        if stored is not None:
            raise CheckpointError(
                f"{self._file_of[stored]}: {stored} is there though config.json says that there is none; "
                "config.json and weights are not of one model"
            )

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
    ) -> torch.Tensor:
        """A tensor as `dtype` on `device`, in its own memory. On torch's meta device it is read but not kept.

        Raises CheckpointError naming file and tensor when it is missing, corrupt, has another shape, or holds
        a number that is not finite in `dtype`; OutOfMemoryError when it does not fit.
        """
        blocks, row = self.blocks(name, shape, dtype), 0
        tensor = allocate(shape, dtype, device)
        for block in blocks:
            tensor[row : row + len(block)].copy_(block)
            row += len(block)
        return tensor

    def blocks(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Iterator[torch.Tensor]:
        """A tensor's rows in blocks, in their stored type. A block is valid until the next one is requested.

        All numbers are finite in `dtype`. Raises the errors of `tensor`.
        """
        file, stored = self._found(name, shape)
        return _finite(file.blocks(stored), dtype, f"{self._file_of[stored]}: {stored}")

    def is_alias(self, name: str, other: str) -> bool:
        """Whether a file stores both tensors as one."""
        stored, twin = self._stored_name(name), self._stored_name(other)
        if stored is None or twin is None or self._file_of[stored] != self._file_of[twin]:
            return False
        return self._opened(self._file_of[stored]).is_alias(stored, twin)

    def close(self) -> None:
        """Closes every file. `bytes_read` stays readable."""
        for file in self._open.values():
            file.close()

    def _found(self, name: str, shape: tuple[int, ...]) -> tuple[WeightFile, str]:
        """The file that has a tensor, and the tensor's name there."""
        stored = self._stored_name(name)
        if stored is None:
            where = ", ".join(sorted({file.name for file in self._file_of.values()}))
            raise CheckpointError(f"{self.path} has no tensor {name} (looked in {where}); fetch it again")
        path = self._file_of[stored]
        file = self._opened(path)
        if stored not in file.names:
            raise CheckpointError(f"{path} lacks {stored} though the index says it is there; fetch it again")
        if file.shape(stored) != shape:
            raise CheckpointError(
                f"{path}: {stored} has shape {list(file.shape(stored))} where config.json asks for "
                f"{list(shape)}; config.json and weights are not of one model"
            )
        return file, stored

    def _stored_name(self, name: str) -> str | None:
        return next((prefix + name for prefix in self._prefixes if prefix + name in self._file_of), None)

    def _opened(self, file: Path) -> WeightFile:
        with self._lock:
            if file not in self._open:
                self._open[file] = open_weight_file(file)
            return self._open[file]


def _finite(blocks: Iterable[torch.Tensor], dtype: torch.dtype, name: str) -> Iterator[torch.Tensor]:
    """Passes blocks on while all their numbers are finite in `dtype`. name: of file and tensor."""
    limit = torch.finfo(dtype).max
    for block in blocks:
        # Both are NaN if any number is.
        low, high = (extreme.item() for extreme in torch.aminmax(block))
        if not -limit <= low <= high <= limit:
            if math.isfinite(low) and math.isfinite(high):
                raise CheckpointError(
                    f"{name} holds numbers from {low:g} to {high:g}, and {dtype} ends at {limit:g}; choose "
                    "another precision"
                )
            raise CheckpointError(
                f"{name} holds NaN or infinite numbers, with which no token can be computed; fetch the model "
                "again, or get an earlier checkpoint of it"
            )
        yield block
