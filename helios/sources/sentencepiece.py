"""Converts the sentencepiece tokenizer of older Llamas to tokenizer.json."""

import shutil
import tempfile
from pathlib import Path

from helios.catalog import SLOW_TOKENIZER_FILES, TOKENIZER_FILE, TOKENIZER_FILES
from helios.errors import CheckpointError

SENTENCEPIECE_FILE = "tokenizer.model"


def has_only_sentencepiece(folder: Path) -> bool:
    """Whether the only tokenizer of a checkpoint is a sentencepiece model."""
    others = (folder / TOKENIZER_FILE).is_file() or all(
        (folder / name).is_file() for name in SLOW_TOKENIZER_FILES
    )
    return (folder / SENTENCEPIECE_FILE).is_file() and not others


def convert(folder: Path, target: Path) -> None:
    """Writes the tokenizer of `folder` into `target` as tokenizer.json and the files beside it.

    transformers converts it and needs the package `sentencepiece` for that. Raises CheckpointError naming the
    file.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as written:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer.save_pretrained(written)
        # transformers raises many kinds of errors for files that it cannot parse.
        except Exception as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{folder / SENTENCEPIECE_FILE} cannot be converted to {TOKENIZER_FILE} ({said}); install "
                f"the package sentencepiece, or put the {TOKENIZER_FILE} of the same model beside it"
            ) from error
        for name in TOKENIZER_FILES:
            if (Path(written) / name).is_file():
                shutil.copyfile(Path(written) / name, target / name)
