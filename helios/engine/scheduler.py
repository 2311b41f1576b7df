"""Continuous batching: which sequences run in the next step, and how many tokens of each.

Decoding sequences come first, one token each, so that a long prompt cannot stall them; prefills share
what is left of the step's token budget in chunks, oldest first. A sequence is admitted when the pool has
blocks for all its tokens. When a running one needs a block and none is free, the youngest running
sequence is preempted: its blocks are freed, and it waits to be recomputed (Kwon et al. 2023, section 4.5).
The oldest is never preempted for a younger one, so every sequence ends.

What this or an earlier sequence has computed of the same beginning is not computed again: its full blocks
are shared (`BlockPool`).
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from helios.engine.block_pool import BlockPool
from helios.engine.chunk_budget import ChunkBudget
from helios.engine.sequence import Sequence, SequenceState


class Scheduler:
    """Queue, running batch and block tables. Not thread-safe: the engine's step owns it."""

    def __init__(
        self,
        pool: BlockPool,
        max_running: int,
        step_token_budget: int,
        chunks: ChunkBudget,
        copy_block: Callable[[int, int], None] | None,
    ) -> None:
        """copy_block(source, target) copies a block's keys and values; None: no block is shared."""
        self.pool = pool
        self.chunks = chunks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest arrival first
        self.preemptions = 0
        # Tokens that need not be computed because others have.
        self.cached_tokens = 0
        # Up to this arrival sequences were under way when a reload had all computed anew.
        self.moved_until = -1
        self._block_tokens = pool.block_tokens
        self._max_running = max_running
        self._step_token_budget = step_token_budget
        self._copy_block = copy_block

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
        prefills = []
        for seq in self.running:
            if seq.pending == 1:
                scheduled.append((seq, 1))
            else:
                prefills.append(seq)
        decoding, waiting = len(scheduled), len(prefills) + len(self.waiting)
        if not waiting:
            return scheduled
        budget -= decoding
        # Those that a reload has made stand still go first: chunks as for new prompts would keep them longer.
        if (prefills[0] if prefills else self.waiting[0]).arrival > self.moved_until:
            budget = min(budget, self.chunks.tokens(decoding, waiting))
        for seq in prefills:
            budget = self._chunk(seq, budget, scheduled)
        while self.waiting and budget > 0 and len(self.running) < self._max_running:
            seq = self.waiting[0]
            if not self._give_blocks(seq):
                break  # first come, first served: nobody overtakes it
            self.waiting.popleft()
            seq.state = SequenceState.RUNNING
            seq.times.scheduled = seq.times.scheduled or time.time_ns()
            insort(self.running, seq, key=lambda running: running.arrival)
            budget = self._chunk(seq, budget, scheduled)
        return scheduled

    def reserve(self, sequences: Iterable[Sequence], tokens: int) -> bool:
        """Gives each of these running sequences blocks for so many tokens more.

        False, and none, if too few are free: nobody is preempted for them.
        """
        wanted = [(seq, missing) for seq in sequences if (missing := self._missing(seq, tokens))]
        if wanted and sum(missing for _, missing in wanted) > self.pool.free_blocks:
            return False
        for seq, missing in wanted:
            seq.blocks += self.pool.allocate(missing)
        return True

    def advance(self, seq: Sequence, count: int) -> None:
        """Notes that keys and values of a sequence's next `count` tokens are in its blocks."""
        before = seq.computed // self.pool.block_tokens
        seq.computed += count
        full = seq.computed // self.pool.block_tokens
        if self._copy_block is not None and full > before:
            digests = seq.digests(self.pool.block_tokens)
            for index in range(before, full):
                self.pool.publish(seq.blocks[index], digests[index])

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it is, and frees its blocks at once."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.state = SequenceState.FINISHED

    def preempt_all(self) -> int:
        """Sends every running sequence back to the queue, to be recomputed. The last one's arrival."""
        last = self.running[-1].arrival if self.running else -1
        while self.running:
            self._preempt(self.running[-1])
        return last

    def _chunk(self, seq: Sequence, budget: int, scheduled: list[tuple[Sequence, int]]) -> int:
        count = min(seq.pending, budget)
        if count > 0:
            scheduled.append((seq, count))
        return budget - max(count, 0)

    def _give_blocks(self, seq: Sequence) -> bool:
        """Blocks for all tokens of a sequence that has none; False, and none, when too few are free."""
        pool, tokens = self.pool, len(seq.token_ids)
        shared = [] if self._copy_block is None else pool.reuse(seq.digests(pool.block_tokens))
        computed = len(shared) * pool.block_tokens
        if self._copy_block is not None and computed == tokens:
            # The last token is computed in any case, for what comes after it, but not where others read.
            source = shared.pop()
            computed -= pool.block_tokens
            if pool.free_blocks:
                target = pool.allocate(1)[0]
                self._copy_block(source, target)
                shared.append(target)
                computed = tokens - 1
            pool.free([source])
        missing = pool.blocks_for(tokens) - len(shared)
        if missing > pool.free_blocks:
            pool.free(shared)
            return False
        seq.blocks, seq.computed = [*shared, *pool.allocate(missing)], computed
        self.cached_tokens += computed
        return True

    def _secure_blocks(self) -> None:
        """Gives each running sequence the blocks its tokens need, oldest first; preempts from the end."""
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            if missing := self._missing(seq):
                if missing > self.pool.free_blocks:
                    self._preempt(self.running[-1])
                    continue
                seq.blocks += self.pool.allocate(missing)
            index += 1

    def _missing(self, seq: Sequence, more: int = 0) -> int:
        """Blocks that a sequence lacks for its tokens and so many more."""
        # Asked of each sequence in each step, which mostly lacks none: of no other object.
        tokens = len(seq.token_ids) + more - len(seq.blocks) * self._block_tokens
        return -(-tokens // self._block_tokens) if tokens > 0 else 0

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
