"""The digest of a model's weights, which does not depend on how its safetensors are laid out in files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from helios.errors import CheckpointError
from helios.weight_map import TensorSlot, WeightMap, read_safetensors_header

_CHUNK_BYTES = 8 << 20

# (bytes read so far, all bytes)
Progress = Callable[[int, int], None]


def weights_digest(folder: Path, progress: Progress | None = None) -> str:
    """SHA-256, in hexadecimal, over every tensor of a checkpoint's safetensors, sorted by name.

    For each tensor the digest takes one line of JSON, `[name, dtype, shape]` with the type's name in safetensors
    and no spaces, and then the tensor's bytes. Exit heads and tokenizer are not part of it. So a model has the
    same digest whole or sharded, and whatever the order of tensors in its files.

    Raises CheckpointError naming the file when it is missing or truncated, or when the weights are pickles.
    """
    weights = WeightMap.read(folder)
    if not weights.is_safetensors:
        raise CheckpointError(
            f"{weights.files[0]}: only the weights of safetensors have a digest; convert it"
        )
    slots: list[tuple[str, TensorSlot, Path]] = []
    for file in weights.files:
        slots += [
            (name, slot, file)
            for name, slot in read_safetensors_header(file).items()
            # Shards may hold tensors that the index does not name; no load reads those.
            if weights.file_of is None or weights.file_of.get(name) == file
        ]
    slots.sort(key=lambda one: one[0])
    total, done = sum(slot.end - slot.start for _, slot, _ in slots), 0
    digest = hashlib.sha256()
    for name, slot, file in slots:
        line = json.dumps([name, slot.dtype, list(slot.shape)], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
        with file.open("rb") as stream:
            stream.seek(slot.start)
            while left := slot.end - stream.tell():
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(f"{file} is truncated at {name}; fetch it again")
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    return digest.hexdigest()
