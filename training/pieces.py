"""Pieces of text files as token ids: those that tune exits, and those that are held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from helios.errors import InvalidRequestError

HELD_SHARE = 0.1  # share of a file, at its end, that is held out


@dataclass(frozen=True)
class TextPieces:
    """A file's pieces, in its order. A piece is [2 to length + 1] ids: each predicts the next one.

    Every piece starts as a served text does, with what the tokenizer puts before a text.
    """

    name: str
    tuning: list[Tensor]
    held: list[Tensor]

    @property
    def tuning_tokens(self) -> int:
        """Number of tokens that the tuning pieces predict."""
        return sum(len(piece) - 1 for piece in self.tuning)


def read_pieces(paths: Sequence[Path], tokenizer: Tokenizer, length: int) -> list[TextPieces]:
    """The pieces of UTF-8 files: one document per file, or per line of a `.jsonl` file (its field "text").

    The last documents of a file are held out, or the end of its only document. Raises InvalidRequestError
    when a file cannot be read or is too short.
    """
    return [_split(path, [_cut(tokenizer, text, length) for text in _documents(path)]) for path in paths]


def _documents(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return [text]
        return [json.loads(line)["text"] for line in text.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(f"{path} cannot be read as text ({error})") from error


def _cut(tokenizer: Tokenizer, text: str, length: int) -> list[Tensor]:
    start = tokenizer.encode("").ids
    ids = tokenizer.encode(text).ids[len(start) :]
    step = length + 1 - len(start)
    pieces = [start + ids[place : place + step] for place in range(0, len(ids), step)]
    return [torch.tensor(piece) for piece in pieces if len(piece) > 1]


def _split(path: Path, documents: list[list[Tensor]]) -> TextPieces:
    pieces = [piece for document in documents for piece in document]
    held = max(2, round(HELD_SHARE * len(pieces)))  # one calibrates, one is measured
    if len(pieces) < 2 * held:
        raise InvalidRequestError(
            f"{path} has {sum(map(len, pieces))} tokens; tuning needs more, better 100,000 in all"
        )
    boundary = len(pieces) - held
    starts, place = [], 0
    for document in documents:
        starts.append(place)
        place += len(document)
    # No document is on both sides, unless it is the first one.
    boundary = max((start for start in starts if 0 < start <= boundary), default=boundary)
    name = path.stem.removesuffix(".train")
    return TextPieces(name, pieces[:boundary], pieces[boundary:])
