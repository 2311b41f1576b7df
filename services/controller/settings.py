"""Settings of the controller, from flags and HELIOS_CONTROLLER_* variables."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from helios.redis_url import RedisUrl
from helios.settings import Address, ListenAddress, ServiceSettings
from helios.slo import Objective, Slo
from services.controller.agenda import AgendaSettings
from services.controller.policy.settings import PolicySettings
from services.controller.routing.settings import RoutingSettings


class ControllerSettings(ServiceSettings, AgendaSettings, RoutingSettings):
    """Everything about a controller that an operator can set, the policy included."""

    model_config = SettingsConfigDict(
        env_prefix="HELIOS_CONTROLLER_", cli_prog_name="python -m services.controller", extra="ignore"
    )

    address: ListenAddress = Field(
        "127.0.0.1:50071", description="host:port to listen on; port 0: any free one"
    )
    advertise: Address | None = Field(
        None, description="host:port under which others reach this controller; default: where it listens"
    )
    redis_url: RedisUrl = Field(
        "redis://127.0.0.1:6379/0", description="Redis with leases, performance history, record and state"
    )
    profiler: Address | None = Field(
        None,
        description="host:port of the profiler; none: decisions rest on what others write to the history",
    )
    models_dir: Path | None = Field(
        None,
        description="folder of models for the shortlist; none: every model that workers can load",
    )
    top_k: int = Field(3, ge=1, description="candidates on the shortlist (TopK)")
    context_tokens: int | None = Field(
        None,
        ge=2,
        description="most tokens of a context, as the workers' setting; default: those of each model",
    )

    mode: Literal["active", "advisory", "off"] = Field(
        "active",
        description="advisory decides and records but changes nothing; off only obeys operators",
    )
    objective: Objective = Field(
        Objective.THROUGHPUT,
        description="SLO until an operator sets one: throughput, latency, energy or accuracy",
    )
    max_perplexity_increase: float | None = Field(
        0.05,
        ge=0,
        description="its bound on the rise of perplexity over the best candidate at full depth, a share",
    )

    min_ready: int = Field(
        1, ge=0, description="workers that keep serving while another one reloads, as far as there are any"
    )
    reload_timeout_seconds: float = Field(600, gt=0, description="longest time a reload may take")
    evaluate_timeout_seconds: float = Field(
        120, gt=0, description="longest time that a reassessment waits for the profiler"
    )
    worker_timeout_seconds: float = Field(
        3, gt=0, description="a worker without telemetry for this long has stopped answering"
    )
    telemetry_seconds: float = Field(0.2, ge=0.05, description="time between two telemetry messages")
    discovery_seconds: float = Field(1, gt=0, description="time between two looks at leases and history")
    lease_seconds: float = Field(5, gt=0, description="life of the leader's lock without renewal")
    record_entries: int = Field(2000, ge=1, description="entries that the decision record keeps")
    prompt_tokens: float = Field(128, gt=0, description="tokens of a mean prompt, until enough were counted")
    output_tokens: float = Field(128, gt=0, description="tokens of a mean output, until enough were counted")
    grace_seconds: float = Field(2, ge=0, description="time that open calls get to end on SIGTERM")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.telemetry_seconds >= self.worker_timeout_seconds:
            raise ValueError("telemetry_seconds must be below worker_timeout_seconds")
        if self.breach_limit > self.window_tokens:
            raise ValueError("breach_limit must not be above window_tokens")
        if self.routing_least_examples > self.routing_examples:
            raise ValueError("routing_least_examples must not be above routing_examples")
        return self

    @property
    def policy(self) -> PolicySettings:
        """The settings on which decisions depend."""
        return PolicySettings(**{name: getattr(self, name) for name in PolicySettings.model_fields})

    @property
    def slo(self) -> Slo:
        """The SLO until an operator sets one."""
        return Slo(self.objective, self.max_perplexity_increase)
