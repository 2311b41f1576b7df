"""Continuous batching: which sequences run in the next step, and how many tokens of each.

Decoding sequences come first, one token each, so that a long prompt cannot stall them; prefills share
what is left of the step's token budget in chunks, oldest first. A sequence is admitted when the pool has
blocks for all its tokens. When a running one needs a block and none is free, the youngest running
sequence is preempted: its blocks are freed, and it waits to be recomputed (Kwon et al. 2023, section 4.5).
The oldest is never preempted for a younger one, so every sequence ends.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator

from helios.engine.kv_cache import BlockPool
from helios.engine.sequence import Sequence, SequenceState


class Scheduler:
    """Queue, running batch and block tables. Not thread-safe: the engine's step owns it."""

    def __init__(self, pool: BlockPool, max_running: int, step_token_budget: int) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest arrival first
        self.preemptions = 0
        self._max_running = max_running
        self._step_token_budget = step_token_budget

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences that have not ended."""
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind those that arrived before it."""
        self.waiting.append(sequence)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, tokens to compute) of the next step; empty when there is nothing to do."""
        self._secure_blocks()
        budget = self._step_token_budget
        scheduled: list[tuple[Sequence, int]] = []
        decodes = [seq for seq in self.running if seq.pending == 1]
        for seq in decodes:
            scheduled.append((seq, 1))
            budget -= 1
        for seq in [seq for seq in self.running if seq.pending > 1]:
            budget = self._chunk(seq, budget, scheduled)
        while self.waiting and budget > 0 and len(self.running) < self._max_running:
            seq = self.waiting[0]
            needed = self.pool.blocks_for(len(seq.token_ids))
            if needed > self.pool.free_blocks:
                break  # first come, first served: nobody overtakes it
            self.waiting.popleft()
            seq.blocks = self.pool.allocate(needed)
            seq.state = SequenceState.RUNNING
            insort(self.running, seq, key=lambda running: running.arrival)
            budget = self._chunk(seq, budget, scheduled)
        return scheduled

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it is, and frees its blocks at once."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.state = SequenceState.FINISHED

    def preempt_all(self) -> int:
        """Sends every running sequence back to the queue, to be recomputed. Returns how many."""
        count = len(self.running)
        while self.running:
            self._preempt(self.running[-1])
        return count

    def _chunk(self, seq: Sequence, budget: int, scheduled: list[tuple[Sequence, int]]) -> int:
        count = min(seq.pending, budget)
        if count > 0:
            scheduled.append((seq, count))
        return budget - max(count, 0)

    def _secure_blocks(self) -> None:
        """Gives each running sequence the blocks its tokens need, oldest first; preempts from the end."""
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            missing = self.pool.blocks_for(len(seq.token_ids)) - len(seq.blocks)
            if missing <= self.pool.free_blocks:
                if missing:
                    seq.blocks += self.pool.allocate(missing)
                index += 1
            else:
                self._preempt(self.running[-1])

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        seq.state = SequenceState.WAITING
        seq.preemptions += 1
        self.preemptions += 1
        # Preempted ones arrived before all that wait, and the youngest is preempted first.
        self.waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.blocks)
        seq.blocks = []
        seq.computed = 0
