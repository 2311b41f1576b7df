"""Runners that wrap the runner of a plan, so that tests can look into an engine's steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from helios.engine import Engine, EngineSettings
from helios.engine.backends.burst import Burst
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.readout import Readout
from helios.engine.backends.runner import Runner
from helios.engine.plan import load_plan
from helios.engine.scheduling.batch import Batch


@dataclass
class HookedRunner:
    """Calls one hook before and one after each call of `runner`."""

    runner: Runner
    before: Callable[[Burst], None]
    after: Callable[[Readout], None]

    @property
    def has_bursts(self) -> bool:
        return self.runner.has_bursts

    @property
    def mixes_depths(self) -> bool:
        return self.runner.mixes_depths

    @property
    def spare_blocks(self) -> int:
        return self.runner.spare_blocks

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        self.before(burst)
        found, exits = self.runner.run(batch, cache, burst)
        self.after(found)
        return found, exits

    def release(self) -> None:
        self.runner.release()


def hooked_engine(
    path: Path,
    depth: int | None,
    settings: EngineSettings,
    before: Callable[[Burst], None] = lambda _: None,
    after: Callable[[Readout], None] = lambda _: None,
) -> Engine:
    """An engine whose first plan calls `before` and `after` at every step."""
    plan = load_plan(path, depth, settings)
    return Engine(replace(plan, runner=HookedRunner(plan.runner, before, after)), settings)
