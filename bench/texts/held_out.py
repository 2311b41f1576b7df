"""Texts that the bundled models were not trained on, and windows of them. See README.md in this folder."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

_TEXTS = Path(__file__).parent
_BETWEEN_DOCUMENTS = "\n\f\n"

# Domains of traffic, and the files of each.
DOMAINS = {"prose": ("kjv",), "technical": ("python", "man")}


def documents(domain: str) -> list[str]:
    """The documents of a domain. Raises KeyError for an unknown one."""
    return [
        document.strip()
        for name in DOMAINS[domain]
        for document in (_TEXTS / f"{name}.txt").read_text().split(_BETWEEN_DOCUMENTS)
    ]


def windows(tokenizer: Tokenizer, domain: str, tokens: int, limit: int | None = None) -> list[list[int]]:
    """Windows of exactly `tokens` ids, each within one document; at most `limit`, evenly spread."""
    found = []
    for document in documents(domain):
        ids = tokenizer.encode(document).ids
        found += [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
    return spread(found, limit)


def spread(items: Sequence[list[int]], limit: int | None) -> list[list[int]]:
    """At most `limit` of the items, evenly spread and in order."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]
