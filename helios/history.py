"""The performance history table (PHT): profiling results of each candidate (arXiv 2504.10724).

Redis holds one JSON document per model, under the schema of `helios.redis_schema`.
"""

import math
import operator
from collections.abc import Mapping
from typing import Annotated

from google.protobuf.json_format import MessageToDict, ParseDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from helios.ignored_entries import fault
from helios.redis_schema import PROFILE_PATTERN, PROFILE_PREFIX
from helios.v1 import profiler_pb2

CONFIDENCE_BINS = 50
# exp() of larger numbers overflows.
MAX_EXPONENT = 700.0

_Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    # A newer version may write fields that this one does not know.
    model_config = ConfigDict(frozen=True, extra="ignore")


class DecodeSpeed(_Record):
    """Seconds of one decode step of `batch` sequences."""

    batch: int = Field(ge=1)
    step_seconds: float = Field(gt=0)


class ExitProfile(_Record):
    """One exit of a candidate. The fields are those of profiler.proto."""

    depth: int = Field(ge=1)
    threshold: float = Field(ge=0, le=1)
    confidence_counts: tuple[_Count, ...]
    agreement_counts: tuple[_Count, ...]
    nats_per_byte: float = Field(ge=0)
    perplexity: float = Field(ge=1)
    decode: tuple[DecodeSpeed, ...] = Field(min_length=1)
    prefill_tokens_per_second: float = Field(gt=0)
    ttft_seconds: float = Field(gt=0)
    weight_bytes: int = Field(gt=0)
    kv_bytes_per_token: int = Field(gt=0)
    load_seconds: float = Field(ge=0)
    joules_per_token: float | None = Field(None, ge=0)

    @property
    def tokens(self) -> int:
        """Number of tokens in the histogram."""
        return sum(self.confidence_counts)

    @property
    def agreement(self) -> float:
        """Share of tokens that equal the last layer's. 1 for an empty histogram."""
        return sum(self.agreement_counts) / self.tokens if self.tokens else 1.0

    @property
    def confidence_nats(self) -> tuple[float, float]:
        """Mean and standard deviation of a token's -ln(confidence)."""
        bins = len(self.confidence_counts)
        values = [-math.log((index + 0.5) / bins) for index in range(bins)]
        tokens = max(self.tokens, 1)
        mean = math.fsum(map(operator.mul, values, self.confidence_counts)) / tokens
        squares = math.fsum(
            count * (value - mean) ** 2 for value, count in zip(values, self.confidence_counts, strict=True)
        )
        return mean, math.sqrt(squares / tokens)

    def share_above(self, threshold: float) -> float:
        """Share of tokens whose confidence bin begins at or above `threshold`: the sure (low-exit) tokens."""
        first = math.ceil(threshold * len(self.confidence_counts) - 1e-9)
        return sum(self.confidence_counts[first:]) / self.tokens if self.tokens else 1.0

    def step_seconds(self, batch: int) -> float:
        """Seconds of a decode step at any batch size.

        Interpolates linearly between measured sizes. Beyond the largest one the last slope continues.
        """
        points = self.decode
        if len(points) == 1 or batch <= points[0].batch:
            return points[0].step_seconds
        upper = next((i for i, point in enumerate(points) if point.batch >= batch), len(points) - 1)
        low, high = points[upper - 1], points[upper]
        slope = (high.step_seconds - low.step_seconds) / (high.batch - low.batch)
        return max(low.step_seconds + slope * (batch - low.batch), low.step_seconds)


class RequestSample(_Record):
    """One request's prompt under a candidate: its bytes of text, and their nats at each exit."""

    id: str
    text_bytes: int = Field(ge=0)
    nats: tuple[float, ...]


class ModelProfile(_Record):
    """Profiling results of one candidate, with time and provenance."""

    model: str
    time: float
    requests: int = Field(ge=0)
    tokens: int = Field(ge=0)
    exits: tuple[ExitProfile, ...] = Field(min_length=1)
    wall_seconds: float = Field(ge=0)
    cpu_seconds: float = Field(ge=0)
    tokenizer_id: str
    bytes_per_token: float = Field(gt=0)
    provenance: Mapping[str, str]
    once_cpu_seconds: float = Field(0.0, ge=0)
    samples: tuple[RequestSample, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "ModelProfile":
        depths = [one.depth for one in self.exits]
        if depths != sorted(set(depths)):
            raise ValueError(f"exits must be ascending, not {depths}")
        if any(len(sample.nats) != len(depths) for sample in self.samples):
            raise ValueError(f"every sample must have the nats of all {len(depths)} exits")
        return self

    @classmethod
    def from_proto(cls, message: profiler_pb2.ModelProfile) -> "ModelProfile":
        """Raises pydantic.ValidationError for a message that is not a valid profile."""
        # The fields have the same names in both.
        fields = MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return cls.model_validate(fields)

    def to_proto(self) -> profiler_pb2.ModelProfile:
        """Converts the profile to a message."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return ParseDict(fields, profiler_pb2.ModelProfile())

    @property
    def full(self) -> ExitProfile:
        """The last exit, which is the whole model."""
        return self.exits[-1]

    def perplexity_increase(self, one: ExitProfile) -> float:
        """Rise of an exit's perplexity over the last layer's, a share: 0.05 is 5 %."""
        nats = (one.nats_per_byte - self.full.nats_per_byte) * self.bytes_per_token
        return math.expm1(min(nats, MAX_EXPONENT))

    def find_exit(self, depth: int) -> ExitProfile | None:
        """The exit after `depth` layers. None if it was not profiled."""
        return next((one for one in self.exits if one.depth == depth), None)

    def at(self, depth: int) -> ExitProfile:
        """The exit after `depth` layers. Raises KeyError if it was not profiled."""
        found = self.find_exit(depth)
        if found is None:
            raise KeyError(f"{self.model} was not profiled at depth {depth}")
        return found


async def write(redis: Redis, profile: ModelProfile) -> None:
    """Replaces a model's document. Raises redis.RedisError when Redis cannot be reached."""
    await redis.set(PROFILE_PREFIX + profile.model, profile.model_dump_json())


async def find(redis: Redis, model: str) -> ModelProfile | None:
    """A model's profile. None if there is none, or none of this version.

    Raises redis.RedisError when Redis cannot be reached.
    """
    document = await redis.get(PROFILE_PREFIX + model)
    try:
        return None if document is None else ModelProfile.model_validate_json(document)
    except ValidationError:
        return None


async def read(redis: Redis) -> tuple[dict[str, ModelProfile], dict[str, str]]:
    """All profiles by model, and the ignored keys with the reason.

    Raises redis.RedisError when Redis cannot be reached.
    """
    profiles, ignored = {}, {}
    keys = sorted([key async for key in redis.scan_iter(match=PROFILE_PATTERN, count=100)])
    for raw_key in keys:
        key = raw_key.decode(errors="replace")
        if not key.startswith(PROFILE_PREFIX):
            ignored[key] = "written by another version of Helios"
            continue
        try:
            document = await redis.get(raw_key)
        except ResponseError as error:
            # It is not a string, or this user may not read it. Other profiles may still be readable.
            ignored[key] = f"it cannot be read: {error}"
            continue
        if document is None:
            continue
        try:
            profile = ModelProfile.model_validate_json(document)
        except ValidationError as error:
            ignored[key] = f"not a profile of this version of Helios: {fault(error)}"
            continue
        if key == PROFILE_PREFIX + profile.model:
            profiles[profile.model] = profile
        else:
            ignored[key] = f"holds the profile of {profile.model}"
    return profiles, ignored
