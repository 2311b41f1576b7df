"""Settings of a worker: environment HELIOS_WORKER_*, or flags."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict

from helios.address import parse
from helios.modes import ExitModeName, PrecisionName
from helios.redis_url import RedisUrl
from helios.routing.probe import PROBE_READINGS, PROBE_TOKENS
from helios.settings import (
    SERVED_BURST_SECONDS,
    SERVED_PROMPT_READINGS,
    ListenAddress,
    ServiceSettings,
)


def _checked_advertise(address: str) -> str:
    # A host without a port gets the port on which the worker listens.
    parse(address if ":" in address else f"{address}:1")
    return address


class WorkerSettings(ServiceSettings):
    """A worker's settings."""

    model_config = SettingsConfigDict(env_prefix="HELIOS_WORKER_", cli_prog_name="python -m services.worker")

    address: ListenAddress = Field(
        "127.0.0.1:50061", description="host:port to listen on; port 0 takes a free one"
    )
    advertise: Annotated[str, AfterValidator(_checked_advertise)] | None = Field(
        None,
        description="host:port or host as gateways reach this worker; default: the address it listens on",
    )
    worker_id: str | None = Field(None, description="name of this worker; default: the advertised address")
    redis_url: RedisUrl | None = Field(
        None, description="Redis to announce this worker in; none: a static worker"
    )
    lease_seconds: float = Field(3.0, gt=0, description="life of the announcement without a heartbeat")
    models_dir: Path | None = Field(None, description="folder of model folders; default: the bundled models")
    model: str | None = Field(None, description="name of the model to serve; default: the first one")
    depth: int | None = Field(
        None, ge=1, description="layers to load, an exit layer; default: the model's default depth"
    )
    plan_file: Path | None = Field(
        None,
        description="file in which the worker keeps the plans that it serves; started again with the same "
        "flags, it serves these, unless Redis names another one; none: it serves what its flags say",
    )
    exit_mode: ExitModeName = Field("greedy", description="how tokens leave the model")
    threshold: float | None = Field(
        None, ge=0, le=1, description="one confidence threshold for all exits; default: the calibrated ones"
    )
    device: str = Field("cpu", description="torch device: cpu, cuda, cuda:1, ...")
    precision: PrecisionName = Field(
        "auto", description="numbers computed in; auto: int8 on a CPU with AVX-512 VNNI, bfloat16 on a GPU"
    )
    threads: int = Field(1, ge=1, description="CPU threads of the engine")
    memory_bytes: int | None = Field(
        None, ge=1, description="budget for weights, activations and KV; default: 40 % of the free memory"
    )
    context_tokens: int | None = Field(
        None,
        ge=2,
        description="most tokens of prompt and output together; a smaller context needs less memory; "
        "default: as many as the model has positions",
    )
    max_running: int = Field(64, ge=1, description="sequences in the running batch")
    max_waiting: int = Field(256, ge=1, description="sequences that may wait for a place in the batch")
    step_token_budget: int = Field(512, ge=1, description="tokens computed in one step, prefill and decode")
    prefill_stretch: float = Field(
        2.5,
        gt=1,
        description="a step that prefills beside decoding sequences takes at most this many times as long as "
        "one that does not; inf: no bound",
    )
    burst_seconds: float = Field(
        SERVED_BURST_SECONDS,
        ge=0,
        allow_inf_nan=False,
        description="as many decode steps as fit into this time are taken at once, and their tokens leave "
        "together; whatever comes in ends such a burst early; 0: one by one",
    )
    block_tokens: int = Field(16, ge=1, description="tokens in a KV block")
    prefix_cache: bool = Field(
        True,
        description="whether requests with the same beginning share its KV (their timing shows that they do)",
    )
    prompt_readings: int = Field(
        SERVED_PROMPT_READINGS,
        ge=0,
        description="tokens of each prompt, at most one in sixteen, whose probabilities are read out in "
        "prefill: they show the controller that the traffic has changed; 0: none",
    )
    probe_tokens: int = Field(
        PROBE_TOKENS,
        ge=0,
        description="tokens at the beginning of a prompt that go through the first exits of loaded models "
        "before its plan is chosen; 0: none",
    )
    probe_readings: int = Field(
        PROBE_READINGS,
        ge=1,
        description="most positions among them whose probabilities are read out, evenly spread; the first "
        "fifth of the tokens is left out",
    )
    min_probe_tokens: int = Field(
        12,
        ge=0,
        description="a prompt in which fewer tokens than this have a next token is not probed and gets the "
        "safe plan",
    )
    probe_prompts: int = Field(
        8, ge=1, description="most prompts that are probed between two steps; more wait for the next step"
    )
    cuda_graphs: bool = Field(
        True, description="whether decode steps on a CUDA device are captured as graphs"
    )
    packed_cache_dir: Path | None = Field(
        None,
        description="where packed weights are kept, on a local disk; default: helios/packed in the user's "
        "cache directory",
    )
    packed_cache_bytes: int = Field(
        16 << 30, ge=0, description="bytes that packed weights may take there; 0: none are kept"
    )
    drain_seconds: float = Field(
        10.0, ge=0, description="time that running sequences have to end when the worker is told to stop"
    )
