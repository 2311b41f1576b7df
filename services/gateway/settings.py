"""Settings of the gateway, from flags and HELIOS_GATEWAY_* variables."""

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from helios.address import parse
from helios.redis_url import RedisUrl
from helios.sampling import SamplingParams
from helios.settings import ListenAddress, ServiceSettings


class GatewaySettings(ServiceSettings):
    """Everything about a gateway that an operator can set."""

    model_config = SettingsConfigDict(
        env_prefix="HELIOS_GATEWAY_", cli_prog_name="python -m services.gateway"
    )

    address: ListenAddress = Field(
        "127.0.0.1:50051", description="host:port to listen on; port 0: any free one"
    )
    redis_url: RedisUrl | None = Field(
        None, description="Redis in which workers hold their leases; none: only `workers`"
    )
    workers: str = Field(
        "", description="workers that are known without Redis: a comma-separated list of host:port"
    )

    max_prompt_tokens: int = Field(2048, ge=1, description="longest prompt, in tokens")
    max_tokens: int = Field(2048, ge=1, description="most tokens that a request may ask for")
    default_max_tokens: int = Field(
        SamplingParams().max_tokens, ge=1, description="tokens generated when a request does not say"
    )
    max_open_streams: int = Field(1024, ge=1, description="streams open at once; more are refused")
    max_queued_streams: int = Field(
        256, ge=1, description="streams that wait for their first token at once; more are refused"
    )
    max_request_seconds: float = Field(600, gt=0, description="longest time a request may take")
    max_request_bytes: int = Field(
        16 << 20, ge=1, description="largest request message; gRPC itself refuses a larger one"
    )

    worker_timeout_seconds: float = Field(
        3, gt=0, description="a worker without telemetry for this long is lost; its streams go elsewhere"
    )
    engine_timeout_seconds: float = Field(
        15, gt=0, description="a worker with work whose engine completes no step for this long is lost"
    )
    worker_wait_seconds: float = Field(30, ge=0, description="how long a stream waits for a ready worker")
    max_resumes: int = Field(
        5, ge=0, description="workers that a stream may lose in a row without a token between"
    )
    quarantine_after: int = Field(
        2,
        ge=2,
        description="a request under which this many workers have failed one after the other ends with "
        "INTERNAL and is sent to no other",
    )
    isolation_seconds: float = Field(
        5,
        ge=0,
        description="how long a request whose worker failed soon after the request began waits for a worker "
        "without other suspects; then it goes on beside others",
    )
    resume_backoff_seconds: float = Field(
        0.1, gt=0, description="pause before the second such resume; doubled for each further one"
    )
    telemetry_seconds: float = Field(0.5, ge=0.05, description="time between two telemetry messages")
    discovery_seconds: float = Field(1, gt=0, description="time between two looks at the leases in Redis")
    redial_seconds: float = Field(0.5, gt=0, description="pause before a lost worker is dialled again")
    overload_retry_seconds: float = Field(
        1,
        gt=0,
        description="retry hint of a refusal, and expected wait for a place at a full worker, until a rate "
        "has been observed",
    )
    rate_window_seconds: float = Field(
        10, gt=0, description="time over which the rates behind retry hints and expected waits are observed"
    )
    max_retry_seconds: float = Field(30, gt=0, description="longest retry hint of a refusal")
    grace_seconds: float = Field(10, ge=0, description="time that open streams get to end on SIGTERM")

    prompt_share: float = Field(
        1, ge=0, le=1, description="share of prompts whose ids are sampled for the profiler; 0 turns it off"
    )
    prompts_per_second: int = Field(50, ge=1, description="most prompts sampled in a second")
    prompts_kept: int = Field(256, ge=1, description="sampled prompts that Redis keeps, the newest")
    prompt_lifetime_seconds: float = Field(
        3600, gt=0, description="time after which a sampled prompt is deleted"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for address in self.worker_addresses:
            try:
                parse(address)
            except ValueError as error:
                raise ValueError(f"workers: {error}") from error
        if self.default_max_tokens > self.max_tokens:
            raise ValueError("default_max_tokens must not be above max_tokens")
        if self.telemetry_seconds >= self.worker_timeout_seconds:
            raise ValueError("telemetry_seconds must be below worker_timeout_seconds")
        return self

    @property
    def worker_addresses(self) -> tuple[str, ...]:
        """The static list of worker addresses."""
        return tuple(part.strip() for part in self.workers.split(",") if part.strip())
