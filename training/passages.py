"""Passages of text files: those that tune exits, and those that are held out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from helios.errors import InvalidRequestError

HELD_SHARE = 0.1  # share of a file, at its end, that is held out
_TOKEN_CHARACTERS = 4  # of an English text


@dataclass(frozen=True)
class Passages:
    """Some lines each of a file's documents, in its order. Only those that are used are tokenized."""

    name: str
    tuning: list[str]
    held: list[str]


def read_passages(paths: Sequence[Path], length: int) -> list[Passages]:
    """Passages of about `length` tokens of UTF-8 files.

    A file is one document, or each line of a `.jsonl` file is one (its field "text"). The last documents of a
    file are held out, or the end of its only document. Raises InvalidRequestError when a file cannot be read
    or is too short.
    """
    return [_split(path, [_passages(text, length) for text in _documents(path)]) for path in paths]


def pieces(tokenizer: Tokenizer, passage: str, length: int) -> Iterator[Tensor]:
    """A passage as pieces of 2 to `length` + 1 ids, of which each predicts the next one.

    Every piece starts as a served text does, with what the tokenizer puts before a text.
    """
    start = tokenizer.encode("").ids
    ids = tokenizer.encode(passage).ids[len(start) :]
    step = length + 1 - len(start)
    for place in range(0, len(ids), step):
        piece = start + ids[place : place + step]
        if len(piece) > 1:
            yield torch.tensor(piece)


def _documents(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return [text]
        return [json.loads(line)["text"] for line in text.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(f"{path} cannot be read as text ({error})") from error


def _passages(text: str, length: int) -> list[str]:
    size = _TOKEN_CHARACTERS * length
    found = [""]
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), size):
            part = line[start : start + size]
            if len(found[-1]) + len(part) > size:
                found.append("")
            found[-1] += part
    return [passage for passage in found if passage.strip()]


def _split(path: Path, documents: list[list[str]]) -> Passages:
    passages = [passage for document in documents for passage in document]
    held = max(2, round(HELD_SHARE * len(passages)))  # one calibrates, one is measured
    if len(passages) < 2 * held:
        raise InvalidRequestError(
            f"{path} has {sum(map(len, passages))} characters; tuning needs more, better 400,000 in all"
        )
    boundary = len(passages) - held
    starts, place = [], 0
    for document in documents:
        starts.append(place)
        place += len(document)
    # No document is on both sides, unless it is the first one.
    boundary = max((start for start in starts if 0 < start <= boundary), default=boundary)
    name = path.stem.removesuffix(".train")
    return Passages(name, passages[:boundary], passages[boundary:])
