"""The saved state of a run. It is written atomically, and a damaged file is refused with a reason."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from helios.errors import CheckpointError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically: a crash leaves the previous file."""
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; raises CheckpointError when the file is missing or damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason}); delete it to start over, or put an "
            "earlier copy in its place"
        ) from error
    return state
