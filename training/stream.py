"""Training windows of token ids from mixed domains, drawn in an order that is reproducible and resumable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from helios.errors import SettingsError
from training.corpora import read_documents
from training.tokenizer import END_OF_TEXT

Tokens = npt.NDArray[np.int64]


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """The ids of all texts in one sequence. Each text starts with `</s>`. [tokens]"""
    encodings = tokenizer.encode_batch(texts)
    return np.fromiter((token for encoding in encodings for token in encoding.ids), dtype=np.int64)


def load_tokens(corpora: Path, tokenizer: Tokenizer, domain: str, split: str) -> Tokens:
    """A domain's split ("train" or "held") as one stream of ids. [tokens]"""
    return encode_documents(tokenizer, [document.text for document in read_documents(corpora, domain, split)])


def held_out_windows(stream: Tokens, length: int, limit: int | None = None) -> Tokens:
    """Windows that cover `stream` without overlap, at most `limit`, evenly spread: [windows, length + 1].

    The first id of each is `</s>`, as the first id of every served sequence is.
    """
    count = (len(stream) - 1) // length
    if count < 1:
        raise SettingsError(f"a text of {len(stream)} tokens is shorter than a window of {length}")
    chosen = np.arange(count)
    if limit is not None and count > limit:
        chosen = np.linspace(0, count - 1, limit).astype(np.int64)
    windows: Tokens = stream[chosen[:, None] * length + np.arange(length + 1)]
    windows[:, 0] = END_OF_TEXT
    return windows


@dataclass
class WindowStream:
    """Draws windows from weighted domains. Its only state is `drawn`: the windows so far by "domain/length".

    For each length a domain is read in separate passes. A pass visits every window once. Its order and
    offset depend only on (seed, domain, length, pass).
    """

    streams: Mapping[str, Tokens]
    weights: Mapping[str, float]
    seed: int
    drawn: dict[str, int]

    def __post_init__(self) -> None:
        if set(self.weights) != set(self.streams):
            raise SettingsError(f"weights for {sorted(self.weights)} but texts for {sorted(self.streams)}")

    def batch(self, step: int, rows: int, length: int) -> Tokens:
        """The windows of a step: [rows, length + 1]. Each starts with `</s>`, as served sequences do."""
        names = sorted(self.weights)
        share = np.array([self.weights[name] for name in names])
        chosen = np.random.default_rng((self.seed, step)).choice(len(names), size=rows, p=share / share.sum())
        windows = np.stack([self._take(names[index], index, length) for index in chosen])
        windows[:, 0] = END_OF_TEXT
        return windows

    def _take(self, domain: str, index: int, length: int) -> Tokens:
        stream = self.streams[domain]
        if len(stream) < 2 * length + 1:
            raise SettingsError(
                f"the text of {domain} has {len(stream)} tokens, too few for windows of {length}"
            )
        key = f"{domain}/{length}"
        per_pass = len(stream) // length - 1
        number, place = divmod(self.drawn.get(key, 0), per_pass)
        order = np.random.default_rng((self.seed, index, number, length))
        start = int(order.integers(length)) + int(order.permutation(per_pass)[place]) * length
        self.drawn[key] = self.drawn.get(key, 0) + 1
        return stream[start : start + length + 1]
