"""The engines that a worker can use, by name. The rest of the service knows only their interface."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from helios.engine import Engine, EngineSettings, ExitMode
from helios.engine.interface import ServingEngine
from helios.engine.kernels import jit
from helios.engine.threads import set_threads
from services.worker.settings import WorkerSettings

log = logging.getLogger(__name__)


class LoadEngine(Protocol):
    """Creates an engine."""

    def __call__(
        self, settings: WorkerSettings, path: Path, depth: int, threshold: float | None = None
    ) -> ServingEngine:
        """An engine that serves the first `depth` layers of a checkpoint directory once it is started.

        `threshold` overrides that of the settings until a reload. Raises HeliosError.
        """


def load_own(
    settings: WorkerSettings, path: Path, depth: int, threshold: float | None = None
) -> ServingEngine:
    """The engine that computes in this process. Also sets the number of threads."""
    set_threads(settings.threads, settings.precision, settings.device)
    log.info("%s", jit.describe())
    engine = Engine.load(path, depth, _engine_settings(settings), threshold)
    log.info("loaded %s depth %d, %s", engine.plan.entry.name, engine.plan.depth, engine.plan.memory)
    return engine


def _engine_settings(settings: WorkerSettings) -> EngineSettings:
    return EngineSettings(
        exit_mode=ExitMode(settings.exit_mode),
        threshold=settings.threshold,
        device=settings.device,
        precision=settings.precision,
        memory_bytes=settings.memory_bytes,
        context_tokens=settings.context_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        step_token_budget=settings.step_token_budget,
        prefill_stretch=settings.prefill_stretch,
        burst_seconds=settings.burst_seconds,
        prompt_readings=settings.prompt_readings,
        probe_tokens=settings.probe_tokens,
        probe_readings=settings.probe_readings,
        min_probe_tokens=settings.min_probe_tokens,
        probe_prompts=settings.probe_prompts,
        block_tokens=settings.block_tokens,
        prefix_cache=settings.prefix_cache,
        cuda_graphs=settings.cuda_graphs,
        packed_cache_dir=settings.packed_cache_dir,
        packed_cache_bytes=settings.packed_cache_bytes,
    )


OWN = "own"
ENGINES: Mapping[str, LoadEngine] = {OWN: load_own}
