"""Recorded traffic without texts: when requests came, and the lengths of prompts and outputs.

The format is that of the Azure LLM inference traces (Patel et al., "Splitwise", ISCA 2024): a CSV file with
the columns TIMESTAMP, ContextTokens and GeneratedTokens.
"""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from helios.errors import SettingsError

_SHORTEST_OUTPUT = 2  # With fewer tokens there is no time between tokens.


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, in seconds after the first, and its lengths in tokens."""

    seconds: float
    prompt_tokens: int
    output_tokens: int


def read(path: Path, count: int) -> list[Arrival]:
    """The first `count` requests of a trace. Raises SettingsError if the file is invalid or too short."""
    try:
        with path.open(newline="") as file:
            rows = [
                (
                    datetime.fromisoformat(row["TIMESTAMP"]).timestamp(),
                    int(row["ContextTokens"]),
                    int(row["GeneratedTokens"]),
                )
                for row in itertools.islice(csv.DictReader(file), count)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{path} is no trace ({error}); it needs the columns TIMESTAMP, ContextTokens, GeneratedTokens"
        ) from error
    if len(rows) < count:
        raise SettingsError(f"{path} has only {len(rows)} requests; ask for fewer")
    return [Arrival(time - rows[0][0], prompt, output) for time, prompt, output in rows]


def shortened(arrivals: Sequence[Arrival], scale: float, context_tokens: int) -> list[Arrival]:
    """The same arrivals with lengths times `scale`, cut so that prompt and output fit the context."""
    fitted = []
    for one in arrivals:
        output = min(max(_SHORTEST_OUTPUT, round(one.output_tokens * scale)), context_tokens // 2)
        prompt = min(max(1, round(one.prompt_tokens * scale)), context_tokens - output)
        fitted.append(replace(one, prompt_tokens=prompt, output_tokens=output))
    return fitted


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same arrivals with their times stretched to `rate` requests a second on average."""
    stretch = (len(arrivals) - 1) / rate / arrivals[-1].seconds
    return [replace(one, seconds=one.seconds * stretch) for one in arrivals]
