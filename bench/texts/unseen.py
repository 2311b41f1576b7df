"""Texts of domains that no bundled model has seen: Latin, and an invented notation, drawn from a seed."""

import random
from pathlib import Path

_LATIN = Path(__file__).parent / "gallic_war.txt"

# Beginnings and ends of invented words.
_ONSETS = ("q", "zh", "kv", "xl", "tz", "vr", "dj", "ng")
_RIMES = ("aux", "yrn", "ee7", "ok", "ub", "iq", "olm", "ax")
_WORDS, _WORDS_A_LINE = 200, (4, 9)
_SIGNS = ("::", "~>", "/", "|", "^", "=!")
_LINES = 400


def texts() -> dict[str, str]:
    """The text of each domain."""
    return {"Latin": _LATIN.read_text(), "notation": _notation(seed=0)}


def _notation(seed: int) -> str:
    """Lines of words and signs. Frequent words are far more frequent than others, as in languages."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choice(_ONSETS) + draw.choice(_RIMES) for _ in range(draw.randint(1, 3)))

    words = [word() for _ in range(_WORDS)]
    weights = [1 / rank for rank in range(1, _WORDS + 1)]

    def line() -> str:
        chosen = draw.choices(words, weights, k=draw.randint(*_WORDS_A_LINE))
        return "".join(f"{one}{draw.choice(_SIGNS)}" for one in chosen) + str(draw.randint(0, 999))

    return "\n".join(line() for _ in range(_LINES))
