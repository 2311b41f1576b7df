"""Passages of text files: those that tune exits, and those that are held out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from helios.errors import InvalidRequestError

HELD_SHARE = 0.1  # share of a file, at its end, that is held out
_TOKEN_CHARACTERS = 4  # of an English text


class Passage(NamedTuple):
    """Some lines of a document, of which the first `prompt` characters are a conversation's prompt."""

    text: str
    prompt: int


class Piece(NamedTuple):
    """Ids of a passage, [2 to length + 1]: each predicts the next one.

    first: the index of the first id that is not a prompt's, at least 1.
    """

    ids: Tensor
    first: int


@dataclass(frozen=True)
class Passages:
    """Some lines each of a file's documents, in its order. Only those that are used are tokenized."""

    name: str
    tuning: list[Passage]
    held: list[Passage]


def read_passages(paths: Sequence[Path], length: int) -> list[Passages]:
    """Passages of about `length` tokens of UTF-8 files.

    A file is one document, or each line of a `.jsonl` file is one: its field "text", and before it the field
    "prompt", if there is one. The last documents of a file are held out, or the end of its only document.
    Raises InvalidRequestError when a file cannot be read or is too short.
    """
    return [_split(path, [_passages(*document, length) for document in _documents(path)]) for path in paths]


def pieces(tokenizer: Tokenizer, passage: Passage, length: int) -> Iterator[Piece]:
    """A passage as pieces of at most `length` + 1 ids.

    Every piece starts as a served text does, with what the tokenizer puts before a text.
    """
    start = tokenizer.encode("").ids
    ids = tokenizer.encode(passage.text).ids[len(start) :]
    # Pieces that are wholly a prompt are left out.
    prompt = len(tokenizer.encode(passage.text[: passage.prompt]).ids) - len(start)
    step = length + 1 - len(start)
    for place in range(0, len(ids), step):
        piece = start + ids[place : place + step]
        first = max(1, len(start) + prompt - place)
        if len(piece) > first:
            yield Piece(torch.tensor(piece), first)


def _documents(path: Path) -> list[tuple[str, str]]:
    """Prompt and text of each document."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return [("", text)]
        lines = [json.loads(line) for line in text.splitlines()]
        return [(line.get("prompt", ""), line["text"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequestError(f"{path} cannot be read as text ({error})") from error


def _passages(prompt: str, text: str, length: int) -> list[Passage]:
    size = _TOKEN_CHARACTERS * length
    found = [""]
    for line in (prompt + text).splitlines(keepends=True):
        for start in range(0, len(line), size):
            part = line[start : start + size]
            if len(found[-1]) + len(part) > size:
                found.append("")
            found[-1] += part
    passages, left = [], len(prompt)
    for part in found:
        if part.strip():
            passages.append(Passage(part, min(left, len(part))))
        left = max(0, left - len(part))
    return passages


def _split(path: Path, documents: list[list[Passage]]) -> Passages:
    passages = [passage for document in documents for passage in document]
    held = max(2, round(HELD_SHARE * len(passages)))  # one calibrates, one is measured
    if len(passages) < 2 * held:
        size = sum(len(passage.text) for passage in passages)
        raise InvalidRequestError(f"{path} has {size} characters; tuning needs more, better 400,000 in all")
    boundary = len(passages) - held
    starts, place = [], 0
    for document in documents:
        starts.append(place)
        place += len(document)
    # No document is on both sides, unless it is the first one.
    boundary = max((start for start in starts if 0 < start <= boundary), default=boundary)
    name = path.stem.removesuffix(".train")
    return Passages(name, passages[:boundary], passages[boundary:])
