"""Settings of the profiler: environment HELIOS_PROFILER_*, or flags."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from helios.calibration import TARGET_AGREEMENT
from helios.modes import PrecisionName
from helios.redis_url import RedisUrl
from helios.routing.probe import PROBE_READINGS, PROBE_TOKENS
from helios.settings import ListenAddress, ServiceSettings
from helios.shortlist import TOP_K
from helios.slo import Objective


class ProfilerSettings(ServiceSettings):
    """A profiler's settings."""

    model_config = SettingsConfigDict(
        env_prefix="HELIOS_PROFILER_", cli_prog_name="python -m services.profiler"
    )

    address: ListenAddress = Field(
        "127.0.0.1:50081", description="host:port to listen on; port 0 takes a free one"
    )
    redis_url: RedisUrl | None = Field(
        None, description="Redis with recent prompts and the results; none: bundled prompts, nothing is kept"
    )
    models_dir: Path | None = Field(None, description="folder of model folders; default: the bundled models")

    objective: Objective = Field(
        Objective.THROUGHPUT, description="what the shortlist is for, when a request names no models"
    )
    top_k: int = Field(TOP_K, ge=1, description="models on the shortlist")
    requests: int = Field(5, ge=1, description="recent requests to evaluate on")
    min_tokens: int = Field(
        256,
        ge=1,
        description="tokens that these must hold together; older ones, then bundled prompts, fill up",
    )
    max_prompt_tokens: int = Field(256, ge=2, description="tokens of a prompt that are used, the first ones")
    generated_tokens: int = Field(16, ge=1, description="tokens that the full model adds to each prompt")
    target_agreement: float = Field(
        TARGET_AGREEMENT,
        gt=0,
        le=1,
        description="share of tokens that must agree with the last layer; sets the exits' thresholds",
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="one confidence threshold for all exits; default: calibrated"
    )
    batches: tuple[int, ...] = Field((1, 8, 32), description="batch sizes at which decoding is timed")
    repetitions: int = Field(
        5,
        ge=1,
        description="timed steps of each kind, shared out among up to five exits; "
        "short ones are timed more often",
    )
    pooled_requests: int = Field(
        100,
        ge=1,
        description="requests on which quality is measured, earlier ones included until the traffic drifts",
    )
    fresh_pooled_requests: int = Field(
        12,
        ge=1,
        description="the same where the traffic seems to have drifted; earlier ones are included unless they "
        "differ by more than chance",
    )
    probe_tokens: int = Field(
        PROBE_TOKENS,
        ge=1,
        description="tokens of a prompt's beginning that a router learns from, as the workers probe",
    )
    probe_readings: int = Field(
        PROBE_READINGS, ge=1, description="how many of these are read at the first exit, as the workers do"
    )
    router_stride: int = Field(
        2, ge=1, description="of the tokens after them, one in so many is read at every exit"
    )
    examples_kept: int = Field(
        200, ge=1, description="evaluated prompts of each model that Redis keeps for routers to learn from"
    )
    power_watts: float | None = Field(
        None, gt=0, description="power while decoding, for machines without a readable meter"
    )

    device: str = Field("cpu", description="torch device: cpu, cuda, cuda:1, ...")
    precision: PrecisionName = Field(
        "auto", description="numbers computed in, as the workers do; auto: the fastest of the device"
    )
    threads: int = Field(1, ge=1, description="CPU threads of an evaluation")
    timing_threads: int | None = Field(
        None, ge=1, description="CPU threads with which steps are timed: a worker's; default: `threads`"
    )
    memory_bytes: int | None = Field(
        None,
        ge=1,
        description="budget for KV and all weights kept loaded; default: 40 % of what is free at the start",
    )
    context_tokens: int | None = Field(
        None,
        ge=2,
        description="most tokens of a context, as the workers' setting; default: those of each model",
    )
    packed_cache_dir: Path | None = Field(
        None,
        description="where packed weights are kept, on a local disk; default: helios/packed in the user's "
        "cache directory",
    )
    packed_cache_bytes: int = Field(
        16 << 30, ge=0, description="what those of all models may take there; 0: none are kept"
    )
    niceness: int = Field(
        10,
        ge=0,
        le=19,
        description="how far evaluations stand back behind serving, but for those after a drift",
    )
    cpu_share: float = Field(
        0.5, gt=0, le=1, description="share of a CPU that an evaluation takes, but for those after a drift"
    )
    max_waiting: int = Field(4, ge=0, description="evaluations that may wait for a running one")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.batches or self.batches[0] < 1 or list(self.batches) != sorted(set(self.batches)):
            raise ValueError("batches must ascend from at least 1")
        return self
