"""What the exits of a frozen model read, kept on disk so that the model runs only once over a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helios.errors import CheckpointError, UnavailableError
from training.exit_reader import ExitReader

_PIECES_PER_SAVE = 8  # an interrupted run computes at most so many pieces again


class ExitStates:
    """Outputs of the exit layers in bfloat16, [tokens, exits, hidden], and the tokens that follow, [tokens].

    The files lie in `directory` and are mapped, so memory holds only what is being read. `identity` says of
    what run they are.

    Raises CheckpointError when the directory holds those of another run, UnavailableError when the disk is
    too small.
    """

    def __init__(
        self, directory: Path, reader: ExitReader, pieces: Sequence[Tensor], identity: dict[str, Any]
    ) -> None:
        self._reader = reader
        self._pieces = pieces
        self._note = directory / "states.json"
        self._identity = identity
        self.count = sum(len(piece) - 1 for piece in pieces)
        shape = (self.count, len(reader.exit_layers), reader.hidden_size)
        directory.mkdir(parents=True, exist_ok=True)
        self._pieces_done = self._find_done(directory, 2 * shape[0] * shape[1] * shape[2] + 8 * self.count)
        size = shape[0] * shape[1] * shape[2]
        path = directory / "states.bin"
        self._states = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16).view(shape)
        self._targets = torch.from_file(
            str(directory / "targets.bin"), shared=True, size=self.count, dtype=torch.int64
        )

    def _find_done(self, directory: Path, size: int) -> int:
        """Number of pieces whose states are there."""
        if self._note.exists():
            note = json.loads(self._note.read_text())
            if note["identity"] != self._identity:
                raise CheckpointError(
                    f"{self._note} is of another run ({note['identity']}); delete {directory}, or choose "
                    "another --state"
                )
            return int(note["pieces"])
        free = shutil.disk_usage(directory).free
        if free < size:
            raise UnavailableError(
                f"{directory} needs {size / 1e9:.1f} GB for the states of {self.count} tokens and has "
                f"{free / 1e9:.1f} GB free; choose another --state, fewer --exit-layers or fewer --steps"
            )
        return 0

    @property
    def done(self) -> int:
        """Number of tokens whose states were there at the start."""
        return sum(len(piece) - 1 for piece in self._pieces[: self._pieces_done])

    def collect(self, progress: Callable[[int], None]) -> None:
        """Run the model over the pieces that are left. progress: called with the number of tokens done."""
        place, first = self.done, self._pieces_done
        for number, piece in enumerate(self._pieces[first:], first + 1):
            rows = slice(place, place + len(piece) - 1)
            for index, state in enumerate(self._reader.states(piece[None, :-1]).values()):
                self._states[rows, index] = state[0].bfloat16()
            self._targets[rows] = piece[1:]
            place = rows.stop
            if number % _PIECES_PER_SAVE == 0 or number == len(self._pieces):
                partial = self._note.with_suffix(".partial")
                partial.write_text(json.dumps({"identity": self._identity, "pieces": number}))
                partial.replace(self._note)
            progress(place)

    def rows(self, places: Tensor | slice) -> tuple[dict[int, Tensor], Tensor]:
        """By exit layer the states [rows, hidden] in fp32, and the tokens that follow, [rows]."""
        states = self._states[places].float()
        layers = self._reader.exit_layers
        return {layer: states[:, index] for index, layer in enumerate(layers)}, self._targets[places]

    def vocabulary(self) -> Tensor:
        """The ids that the texts contain, ascending."""
        found: Tensor = self._targets.unique()
        return found

    def delete(self) -> None:
        """Delete the files."""
        for name in ("states.json", "states.bin", "targets.bin"):
            (self._note.parent / name).unlink(missing_ok=True)
