"""Runners execute the steps of a plan. A runner is chosen once, when the plan is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from helios.engine.backends.burst import Burst
from helios.engine.backends.compiled import CompiledModel
from helios.engine.backends.cuda_graphs import GraphRunner
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Backend, Model
from helios.engine.backends.readout import Readout
from helios.engine.scheduling.batch import Batch


class Runner(Protocol):
    """Runs steps on any cache that its model can use. One call at a time."""

    @property
    def has_bursts(self) -> bool:
        """Whether a call takes all steps of a `Burst` and chooses all tokens.

        If not, it takes one step, and the caller chooses all tokens that are not simply the most likely ones.
        """

    @property
    def mixes_depths(self) -> bool:
        """Whether the rows of a batch may have several depths (`Batch.depths`)."""

    @property
    def spare_blocks(self) -> int:
        """Blocks at the end of the cache that the runner needs for itself. No sequence may use them."""

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """Returns the readout of the read rows and the exit layer of each, for all steps in order.

        The result is valid until the next call. Writes the KV of all rows.
        """

    def release(self) -> None:
        """Frees what it keeps for a cache that is about to be dropped."""


@dataclass(frozen=True, slots=True)
class StaticRunner:
    """Every row leaves at its sequence's depth (exit modes full and greedy)."""

    backend: CompiledModel
    has_bursts: bool = True
    mixes_depths: bool = True
    spare_blocks: int = 0

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """See `Runner.run`."""
        return self.backend.step_mixed(batch, cache, burst)

    def release(self) -> None:
        """Does nothing: this runner keeps nothing."""


@dataclass(frozen=True, slots=True)
class EagerRunner:
    """`StaticRunner` for the backend that takes one step of one depth at a time."""

    backend: Backend
    has_bursts: bool = False
    mixes_depths: bool = False
    spare_blocks: int = 0

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """See `Runner.run`."""
        depth = batch.depth
        found = self.backend.step(batch, cache, depth, burst)
        return found, [depth] * len(found.best)

    def release(self) -> None:
        """Does nothing: this runner keeps nothing."""


@dataclass(frozen=True, slots=True)
class DynamicRunner:
    """Each decode row leaves at its own exit (exit mode dynamic)."""

    backend: Backend
    # The confidence that each exit before the last layer requires.
    thresholds: Mapping[int, float]
    has_bursts: bool
    mixes_depths: bool = False
    spare_blocks: int = 0

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """See `Runner.run`."""
        return self.backend.step_dynamic(batch, cache, self.thresholds, burst)

    def release(self) -> None:
        """Does nothing: this runner keeps nothing."""


def choose_runner(
    model: Model, thresholds: Mapping[int, float] | None, *, cuda_graphs: bool, most_rows: int
) -> Runner:
    """The runner for a loaded model.

    thresholds: those of dynamic exits. None: every row leaves at its known depth. cuda_graphs: whether decode
    steps of up to `most_rows` rows may be captured, if the device has graphs.
    """
    if thresholds is not None:
        return DynamicRunner(model.backend, thresholds, model.has_bursts)
    if cuda_graphs and model.device.type == "cuda":
        return GraphRunner(model, most_rows)
    if isinstance(model.backend, CompiledModel):
        return StaticRunner(model.backend)
    return EagerRunner(model.backend)
