"""What runs the steps of a plan: chosen once, when the plan is loaded. Later nobody asks for a backend."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from helios.engine.backends.burst import Burst
from helios.engine.backends.cuda_graphs import GraphRunner
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Backend, Model
from helios.engine.backends.readout import Readout
from helios.engine.scheduling.batch import Batch


class Runner(Protocol):
    """Runs steps of one plan, on any cache that its model can use. One call at a time."""

    @property
    def has_bursts(self) -> bool:
        """Whether a call takes the steps of a `Burst` and chooses all tokens; else it takes one step, and the
        caller chooses tokens that are not simply the likeliest."""

    @property
    def spare_blocks(self) -> int:
        """Blocks at the end of the cache that it needs for itself: no sequence may have them."""

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """The readout of the read rows, and the exit layer of each; of all steps, one after the other.

        Valid until the next call. Writes the KV of all rows.
        """

    def release(self) -> None:
        """Frees what it keeps for a cache that goes."""


@dataclass(frozen=True, slots=True)
class StaticRunner:
    """Every row leaves after the last layer (exit modes full and greedy)."""

    backend: Backend
    depth: int
    has_bursts: bool
    spare_blocks: int = 0

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """As `Runner` says."""
        found = self.backend.step(batch, cache, self.depth, burst)
        return found, [self.depth] * len(found.best)

    def release(self) -> None:
        """Keeps nothing."""


@dataclass(frozen=True, slots=True)
class DynamicRunner:
    """Each decode row leaves at its own exit (exit mode dynamic)."""

    backend: Backend
    # The confidence that each exit before the last layer asks for.
    thresholds: Mapping[int, float]
    has_bursts: bool
    spare_blocks: int = 0

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """As `Runner` says."""
        return self.backend.step_dynamic(batch, cache, self.thresholds, burst)

    def release(self) -> None:
        """Keeps nothing."""


def choose_runner(
    model: Model, thresholds: Mapping[int, float] | None, *, cuda_graphs: bool, most_rows: int
) -> Runner:
    """The runner for a loaded model.

    thresholds: of dynamic exits; None: no row leaves before the last layer. cuda_graphs: whether decode steps
    of up to `most_rows` rows may be captured, where the device has graphs.
    """
    if thresholds is not None:
        return DynamicRunner(model.backend, thresholds, model.has_bursts)
    if cuda_graphs and model.device.type == "cuda":
        return GraphRunner(model, most_rows)
    return StaticRunner(model.backend, model.depth, model.has_bursts)
