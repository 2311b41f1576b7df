"""Reads a JSON object from a file of a checkpoint. Does not import torch."""

import json
from pathlib import Path
from typing import Any

from helios.errors import CheckpointError


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file if there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is {file.parent} a model directory?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(value).__name__}; fetch it again")
    return value
