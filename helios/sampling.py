"""Sampling parameters of a request, checked once and identical in every service."""

import math
from dataclasses import dataclass, replace
from numbers import Integral

from helios.errors import InvalidRequestError
from helios.v1 import generation_pb2

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
_SEED_LIMIT = 1 << 64
_TOP_K_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request. `temperature` 0 means greedy; `top_k` 0 means no limit."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidRequestError naming the field that is out of range."""
        for name in ("max_tokens", "top_k", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise InvalidRequestError(f"sampling.{name} must be a whole number")
        if self.max_tokens < 1:
            raise InvalidRequestError("sampling.max_tokens must be at least 1")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InvalidRequestError(
                f"sampling.temperature must be a finite number of at least 0, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"sampling.top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.top_k < _TOP_K_LIMIT:
            raise InvalidRequestError(
                f"sampling.top_k must be at least 0 and fit 32 unsigned bits, not {self.top_k}"
            )
        if not math.isfinite(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise InvalidRequestError(
                f"sampling.repetition_penalty must be a finite number above 0, not {self.repetition_penalty}"
            )
        if not 0 <= self.seed < _SEED_LIMIT:
            raise InvalidRequestError("sampling.seed must fit 64 unsigned bits")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"sampling.stop takes at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidRequestError(
                    f"each of sampling.stop must have 1 to {MAX_STOP_CHARACTERS} characters"
                )

    @classmethod
    def from_proto(
        cls, message: generation_pb2.SamplingParams, *, default_max_tokens: int, default_seed: int
    ) -> "SamplingParams":
        """The parameters of a request. Unset fields get their defaults."""
        return cls(
            max_tokens=message.max_tokens if message.HasField("max_tokens") else default_max_tokens,
            temperature=message.temperature,
            top_k=message.top_k,
            top_p=message.top_p if message.HasField("top_p") else 1.0,
            repetition_penalty=(
                message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
            ),
            seed=message.seed if message.HasField("seed") else default_seed,
            stop=tuple(message.stop),
            ignore_eos=message.ignore_eos,
        )

    def capped(self, max_tokens: int) -> "SamplingParams":
        """These parameters with at most this many tokens."""
        return self if self.max_tokens <= max_tokens else replace(self, max_tokens=max_tokens)

    def to_proto(self) -> generation_pb2.SamplingParams:
        """The parameters as a message with every field set."""
        return generation_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )
