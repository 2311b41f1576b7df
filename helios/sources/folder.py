"""Copies what serving needs of a checkpoint's folder."""

import os
import shutil
from pathlib import Path

from helios.architectures.registry import CONFIG_FILE, GENERATION_FILE
from helios.catalog import EXITS_FILE, FACTS_FILE, TOKENIZER_FILES
from helios.sources.progress import Progress
from helios.weight_map import INDEX_SUFFIX, SINGLE_FILES, WeightMap

# Files beside the weights. They are small, and enough to reject a model early.
FILES = (
    CONFIG_FILE,
    GENERATION_FILE,
    FACTS_FILE,
    EXITS_FILE,
    *TOKENIZER_FILES,
    "README.md",
    "LICENSE",
    "LICENSE.md",
)


def is_weights(name: str) -> bool:
    """Whether a file holds weights in safetensors, or is their index."""
    stem, suffix = SINGLE_FILES[0].split(".")
    sharded = name.startswith(f"{stem}-") and name.endswith(f".{suffix}")
    return sharded or name in (SINGLE_FILES[0], SINGLE_FILES[0] + INDEX_SUFFIX)


def place(folder: Path, target: Path, progress: Progress, *, may_link: bool) -> None:
    """Copies the files of a checkpoint into the folder `target`. may_link: hard links are as good as copies.

    Raises CheckpointError when the weights are not whole, OSError when a file cannot be written.
    """
    weights = WeightMap.read(folder)
    files = [*(folder / name for name in FILES if (folder / name).is_file()), *weights.files]
    if weights.file_of is not None:
        files.append(folder / (SINGLE_FILES[0 if weights.is_safetensors else 1] + INDEX_SUFFIX))
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        _place(file, target / file.name, may_link=may_link)
        done += file.stat().st_size
        progress(file.name, done, total)


def _place(source: Path, target: Path, *, may_link: bool) -> None:
    if may_link:
        # The hub's cache never changes a file in place, so a hard link is safe.
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass  # Another file system, or one without hard links: copy instead.
    shutil.copyfile(source, target)
