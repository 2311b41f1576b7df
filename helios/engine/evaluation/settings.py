"""Settings of an evaluation."""

from dataclasses import dataclass
from pathlib import Path

import torch

from helios.calibration import TARGET_AGREEMENT
from helios.engine.backends.kv_cache import kv_dtype
from helios.engine.memory import device_budget
from helios.engine.weights.packed_cache import DEFAULT_LIMIT_BYTES
from helios.engine.weights.precision import precision_on
from helios.errors import SettingsError
from helios.modes import Precision
from helios.routing.probe import PROBE_READINGS, PROBE_TOKENS


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Settings of an evaluation. Tokens and sequences are counts, memory is bytes, power is watts."""

    target_agreement: float = TARGET_AGREEMENT
    # One threshold for every exit. None: thresholds are calibrated on the prompts.
    threshold: float | None = None
    # Longer prompts are cut to their first tokens.
    max_prompt_tokens: int = 256
    generated_tokens: int = 32
    batches: tuple[int, ...] = (1, 8, 32)
    # Timed steps of each kind, distributed over the timed exits. Short steps are repeated more often.
    repetitions: int = 5
    device: str = "cpu"
    precision: str = Precision.FLOAT32
    # Budget for weights and KV. None: a share of the device's free memory.
    memory_bytes: int | None = None
    # Power while decoding, for machines without a readable meter. None: energy is unknown on such machines.
    power_watts: float | None = None
    # CPU threads for timed steps. None: the threads of the evaluation.
    timing_threads: int | None = None
    # What a router learns from: tokens of a prompt's beginning, how many of these are read at the first exit,
    # and the spacing of the later tokens, which are read at every exit.
    probe_tokens: int = PROBE_TOKENS
    probe_readings: int = PROBE_READINGS
    router_stride: int = 2
    block_tokens: int = 16
    # Directory of packed weights, as in EngineSettings.
    packed_cache_dir: Path | None = None
    packed_cache_bytes: int = DEFAULT_LIMIT_BYTES

    def __post_init__(self) -> None:
        """Raises SettingsError naming the setting that is out of range."""
        for name in (
            "max_prompt_tokens",
            "generated_tokens",
            "repetitions",
            "probe_tokens",
            "probe_readings",
            "router_stride",
            "block_tokens",
        ):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1")
        if not self.batches or self.batches[0] < 1 or list(self.batches) != sorted(set(self.batches)):
            raise SettingsError(f"batches must ascend from at least 1, not {self.batches}")
        if self.precision not in list(Precision):
            raise SettingsError(f"precision {self.precision} is unknown; use one of {', '.join(Precision)}")

    @property
    def budget(self) -> int:
        """Bytes that an evaluation may take now."""
        return self.memory_bytes or device_budget(torch.device(self.device))

    @property
    def precision_here(self) -> Precision:
        """The precision that the device uses. Raises SettingsError when it does not support `precision`."""
        return precision_on(Precision(self.precision), torch.device(self.device))

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of keys and values."""
        return kv_dtype(self.precision_here, torch.device(self.device))
