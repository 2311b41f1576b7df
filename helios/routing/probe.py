"""What a probe of a prompt shows: the input of the router."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExitReading:
    """What a model's first exit says of a sample of a prompt's tokens. `tokens` counts the sample.

    nats: mean negative natural log-probability of the prompt's own next token. doubt: mean -ln(confidence).
    """

    depth: int
    tokens: int
    nats: float
    doubt: float


@dataclass(frozen=True, slots=True)
class Probe:
    """What the first exits of models say of a prompt's first tokens, by model.

    first_ids: the tokens that were probed. A prompt that is too short to be probed has no readings.
    """

    prompt_tokens: int
    readings: Mapping[str, ExitReading]
    first_ids: tuple[int, ...] = ()


# Defaults of workers and of the profiler: tokens that are probed, and positions among them that are read out.
# Examples are only like probes if both read the same.
PROBE_TOKENS, PROBE_READINGS = 32, 12


def evenly_spread(count: int, size: int) -> list[int]:
    """`count` of the positions 0..size - 1, evenly spread. count: at most `size`."""
    return [(2 * index + 1) * size // (2 * count) for index in range(count)]


def read_positions(tokens: int, most: int) -> list[int]:
    """Positions of a probed beginning of `tokens` tokens that are read out, at most `most`, evenly spread.

    The first ones are left out: a model knows too little before them.
    """
    first = tokens // 5
    left = tokens - first
    return [first + position for position in evenly_spread(min(most, left), left)]
