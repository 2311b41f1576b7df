"""Decode steps of fixed shapes, run as captured CUDA graphs: one launch instead of hundreds."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray

from helios.engine.backends.burst import ONE_STEP, Burst
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.backends.readout import Readout
from helios.engine.scheduling.batch import Batch

log = logging.getLogger(__name__)

# Runs before a capture, so that one-time set-up in libraries is not captured.
_WARM_UPS = 2


@dataclass(frozen=True)
class PaddedDecode:
    """A decode step of `rows` rows through `depth` layers, with contexts of up to `blocks` blocks.

    Its tensors never move. Unused rows are padding: they write to `spare_block`, which no sequence has, and
    attend only to themselves.
    """

    model: Model
    cache: KVCache
    depth: int
    rows: int
    blocks: int
    spare_block: int

    @cached_property
    def batch(self) -> Batch:
        """Only padding until `fill` is called."""
        device = self.model.device
        zeros = torch.zeros(self.rows, dtype=torch.int64, device=device)
        each = torch.arange(self.rows, device=device)
        size = self.cache.block_tokens
        return Batch.of(
            token_ids=zeros,
            positions=zeros,
            slots=torch.full_like(zeros, self.spare_block * size),
            tables=torch.full((self.rows, self.blocks), self.spare_block, device=device),
            row_tables=each,
            decode_rows=self.rows,
            block_tokens=size,
            chunks=(),
            read_rows=each,
        )

    def fill(self, batch: Batch) -> None:
        """Copies the rows of a step that only decodes."""
        mine, rows, width = self.batch, batch.rows, batch.width
        spare = self.spare_block
        for own, new, padding in (
            (mine.token_ids, batch.token_ids, 0),
            (mine.positions, batch.positions, 0),
            (mine.slots, batch.slots, spare * self.cache.block_tokens),
        ):
            own[:rows] = new
            own[rows:] = padding
        mine.tables[:rows, :width] = batch.tables
        mine.tables[:rows, width:] = spare
        mine.tables[rows:] = spare

    def compute(self) -> Readout:
        """The readout of all rows. Writes their KV."""
        # The batch's masks depend on its positions, so they are computed again, inside the graph.
        batch = replace(self.batch)
        return self.model.backend.step(batch, self.cache, self.depth, ONE_STEP)


class GraphRunner:
    """Runs decode steps as graphs of `PaddedDecode`, and all other steps with the model's backend.

    Each graph is of one depth and is captured at first use. Rows and blocks are rounded up to powers of two.
    Graphs are valid as long as the cache keeps its tensors. Padding uses the cache's last block.
    """

    has_bursts = False
    mixes_depths = False
    spare_blocks = 1

    def __init__(self, model: Model, most_rows: int) -> None:
        """most_rows: largest number of rows for which a step is captured."""
        self._model, self._most_rows = model, most_rows
        # By depth, rows and blocks.
        self._graphs: dict[tuple[int, int, int], tuple[PaddedDecode, torch.cuda.CUDAGraph, Readout]] = {}
        # Addresses of the cache on which the graphs were captured.
        self._addresses: tuple[NDArray[Any], NDArray[Any]] | None = None

    def run(self, batch: Batch, cache: KVCache, burst: Burst) -> tuple[Readout, list[int]]:
        """See `Runner.run`."""
        depth = batch.depth
        if batch.chunks or batch.rows > self._most_rows:
            found = self._model.backend.step(batch, cache, depth, burst)
        else:
            found = self._replayed(batch, cache, depth)
        return found, [depth] * len(found.best)

    def release(self) -> None:
        """Frees all graphs and the memory that they allocated."""
        self._graphs.clear()
        self._addresses = None

    def _replayed(self, batch: Batch, cache: KVCache, depth: int) -> Readout:
        if self._addresses is not cache.addresses:
            self.release()
            self._addresses = cache.addresses
        rows = batch.rows
        key = depth, _at_least(rows), _at_least(batch.width)
        if key not in self._graphs:
            self._graphs[key] = self._captured(cache, *key)
        step, graph, found = self._graphs[key]
        step.fill(batch)
        graph.replay()
        return found.rows(slice(rows))

    def _captured(
        self, cache: KVCache, depth: int, rows: int, blocks: int
    ) -> tuple[PaddedDecode, torch.cuda.CUDAGraph, Readout]:
        step = PaddedDecode(self._model, cache, depth, rows, blocks, spare_block=cache.num_blocks - 1)
        device = self._model.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step.compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # All graphs share one memory pool, because only one runs at a time. Another thread may allocate
        # during a reload.
        pool = next((graph.pool() for _, graph, _ in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            found = step.compute()
        log.info("captured a decode step of %d layers, %d rows and %d blocks", depth, rows, blocks)
        return step, graph, found


def _at_least(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
