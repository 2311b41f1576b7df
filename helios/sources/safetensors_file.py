"""Writes a safetensors file one piece at a time, so that it never has to fit into memory."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FLOAT32_BYTES = 4
_HEADER_ALIGNMENT = 8


def write_float32(
    file: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[NDArray[np.float32]]
) -> None:
    """Writes tensors in float32. Format: github.com/huggingface/safetensors.

    pieces: the elements of all tensors in the order of `shapes`, cut anywhere. Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * _FLOAT32_BYTES
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    line = json.dumps(header).encode()
    line += b" " * (-len(line) % _HEADER_ALIGNMENT)
    written = 0
    with file.open("wb") as stream:
        stream.write(len(line).to_bytes(8, "little") + line)
        for piece in pieces:
            written += stream.write(np.ascontiguousarray(piece, dtype="<f4").data)
    if written != end:
        raise ValueError(f"{written} bytes of tensors instead of {end}")
