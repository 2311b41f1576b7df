"""How close a precision comes to float32 at every exit, on the same text."""

import math
from collections.abc import Sequence

import numpy as np

from helios.catalog import Fidelity, ModelEntry
from helios.engine.evaluation.trace import trace_exits
from helios.engine.plan import load_plan
from helios.engine.settings import EngineSettings
from helios.engine.tokenizer import load_tokenizer
from helios.errors import InvalidRequestError
from helios.modes import ExitMode, Precision

# Tokens of a piece of text, where the context is not smaller.
_PIECE_TOKENS = 2048


def cut(entry: ModelEntry, texts: Sequence[str], windows: int) -> list[list[int]]:
    """Cuts at most `windows` evenly spread pieces out of the texts: token ids that fill the context, or
    2,048 of them where the context is larger.

    Each begins like a served sequence, with the tokens that the tokenizer puts before a text.

    Raises InvalidRequestError when the texts are too short for one piece.
    """
    tokenizer = load_tokenizer(entry.path, entry.facts).tokenizer
    beginning = tokenizer.encode("").ids
    size = min(entry.context_tokens, _PIECE_TOKENS) - len(beginning)
    found = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found += [[*beginning, *ids[start : start + size]] for start in range(0, len(ids) - size + 1, size)]
    if not found:
        raise InvalidRequestError(f"the text must have at least {size} tokens of {entry.name}")
    return (
        [found[index * len(found) // windows] for index in range(windows)] if len(found) > windows else found
    )


def measure_fidelity(
    entry: ModelEntry, precision: str, texts: Sequence[Sequence[int]], device: str = "cpu"
) -> dict[int, Fidelity]:
    """Fidelity by exit layer. texts: token ids, at least two each. Raises the errors of `load_plan`."""
    traces = {}
    for one in (Precision.FLOAT32, precision):
        settings = EngineSettings(
            exit_mode=ExitMode.DYNAMIC,
            precision=one,
            device=device,
            context_tokens=max(2, *map(len, texts)),
        )
        traces[one] = trace_exits(load_plan(entry.path, None, settings), texts)
    found = {}
    for row, layer in enumerate(entry.exit_layers):
        nats, tops = {}, {}
        for one, of_texts in traces.items():
            nats[one] = np.concatenate([trace.nats[row] for trace in of_texts]).mean(dtype=np.float64)
            tops[one] = np.concatenate([trace.top_ids[row] for trace in of_texts])
        found[layer] = Fidelity(
            perplexity_increase=math.exp(nats[precision] - nats[Precision.FLOAT32]) - 1,
            agreement=float((tops[precision] == tops[Precision.FLOAT32]).mean()),
            tokens=len(tops[precision]),
        )
    return found
