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
    """What the first exits of the loaded models say of a prompt's first tokens, by model.

    A prompt that is too short to be probed has no readings.
    """

    prompt_tokens: int
    readings: Mapping[str, ExitReading]
