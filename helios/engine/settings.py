"""Limits and modes of an engine."""

import math
from dataclasses import dataclass
from pathlib import Path

from helios.engine.weights.packed_cache import DEFAULT_LIMIT_BYTES
from helios.errors import SettingsError
from helios.modes import ExitMode, Precision
from helios.routing.probe import PROBE_READINGS, PROBE_TOKENS


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits of an engine. Tokens and sequences are counts, memory is bytes."""

    exit_mode: ExitMode = ExitMode.GREEDY
    # One threshold for every exit. None: each exit uses its calibrated one.
    threshold: float | None = None
    device: str = "cpu"
    precision: str = "float32"
    # For weights, activations and KV together. None: a share of the memory that is free on the device at the
    # start.
    memory_bytes: int | None = None
    # Most tokens of prompt and output together. None, or more than a model's own context: the latter.
    context_tokens: int | None = None
    max_running: int = 64
    max_waiting: int = 256
    step_token_budget: int = 512
    # A step with prefill beside decoding sequences takes at most this many times as long as one without.
    prefill_stretch: float = 2.5
    # Time of one burst: as many decode steps as fit into it run in one call, which saves overhead between
    # steps. 0: one step per call.
    burst_seconds: float = 0.0
    block_tokens: int = 16
    # Whether sequences with the same prefix share its KV.
    prefix_cache: bool = True
    # Most tokens of each prompt whose probabilities are read out during prefill. They show how well the plan
    # predicts the traffic. At most one in sixteen tokens is read. 0: none.
    prompt_readings: int = 0
    # Tokens at the beginning of each prompt that go through the first exits of loaded models before its plan
    # is chosen, if it is submitted with a route. Never more than step_token_budget. 0: none.
    probe_tokens: int = PROBE_TOKENS
    # Most positions among them whose probabilities are read out, evenly spread after the first fifth.
    probe_readings: int = PROBE_READINGS
    # A prompt in which fewer tokens than this have a next token is not probed: its probe has no readings.
    min_probe_tokens: int = 12
    # Most prompts that are probed between two steps. More wait for the next step.
    probe_prompts: int = 8
    # Whether decode steps on a CUDA device are captured as graphs.
    cuda_graphs: bool = True
    # Directory in which packed weights are kept between loads. None: helios/packed in the user's cache
    # directory.
    packed_cache_dir: Path | None = None
    # Most bytes that the packed weights of all models may use there. 0: none are kept.
    packed_cache_bytes: int = DEFAULT_LIMIT_BYTES

    def __post_init__(self) -> None:
        """Raises SettingsError naming the setting that is out of range."""
        for name in (
            "max_running",
            "max_waiting",
            "step_token_budget",
            "block_tokens",
            "probe_readings",
            "probe_prompts",
        ):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1")
        if self.context_tokens is not None and self.context_tokens < 2:
            raise SettingsError("context_tokens must be at least 2: a prompt and an output need one each")
        if self.step_token_budget < self.max_running:
            raise SettingsError(
                f"step_token_budget ({self.step_token_budget}) must be at least max_running "
                f"({self.max_running}), so that every running sequence gets its token in each step"
            )
        if not self.prefill_stretch > 1:
            raise SettingsError(f"prefill_stretch must be above 1, not {self.prefill_stretch}")
        if not 0 <= self.burst_seconds < math.inf:
            raise SettingsError(f"burst_seconds must be at least 0, not {self.burst_seconds}")
        for name in ("prompt_readings", "probe_tokens", "min_probe_tokens", "packed_cache_bytes"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must be at least 0")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise SettingsError(f"threshold must be a probability, not {self.threshold}")
        if self.precision not in list(Precision):
            raise SettingsError(f"precision {self.precision} is unknown; use one of {', '.join(Precision)}")
