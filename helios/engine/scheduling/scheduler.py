"""Continuous batching: which sequences run in the next step, and how many tokens of each.

Decoding sequences come first with one token each, so that a long prompt cannot stall them. Prefills share the
rest of the step's token budget in chunks, oldest first. A sequence is admitted when the pool has blocks for
all its tokens. When a running sequence needs a block and none is free, the youngest running sequence is
preempted: its blocks are freed, and it waits to be recomputed (Kwon et al. 2023, section 4.5). The oldest is
never preempted for a younger one, so every sequence ends.

A prefix that this or an earlier sequence has already computed is not computed again: its full blocks are
shared (`BlockPool`).

Blocks may differ in their number of layers. A sequence whose plan has few layers can use more of them. It is
preempted for another sequence only if that one can use some of its blocks, and overtakes it only with blocks
that it cannot use.
"""

import itertools
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from helios.engine.scheduling.block_pool import BlockPool
from helios.engine.scheduling.chunk_budget import ChunkBudget
from helios.engine.scheduling.sequence import Sequence, SequenceState


class Scheduler:
    """Queue, running batch and block tables. Not thread-safe: only the engine's step uses it."""

    def __init__(
        self,
        pool: BlockPool,
        max_running: int,
        step_token_budget: int,
        chunks: ChunkBudget,
        copy_block: Callable[[int, int], None] | None,
    ) -> None:
        """copy_block(source, target) copies a block's KV. None: blocks are not shared."""
        self.pool = pool
        self.chunks = chunks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest arrival first
        self.preemptions = 0
        # Tokens that were not computed because an earlier sequence had the same prefix.
        self.cached_tokens = 0
        # Prefills of sequences that arrived up to this one may use the whole rest of a step, not only a
        # chunk, because a reload has interrupted them.
        self.unbounded_until = -1
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

    def schedule(self, least: int = 0) -> list[tuple[Sequence, int]]:
        """Returns (sequence, tokens to compute) pairs for the next step; empty when there is nothing to do.

        least: prompt tokens that the step may take beside decodes, even if that is more than a chunk.
        """
        self._secure_blocks()
        self._make_room()
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
        # A sequence that was sent back can be older than prompts whose prefill has begun.
        while prefills and self.waiting and self.waiting[0].arrival < prefills[-1].arrival:
            if (admitted := self._admit()) is None:
                break
            insort(prefills, admitted, key=lambda seq: seq.arrival)
        first = prefills[0] if prefills else self.waiting[0]
        if scheduled and first.arrival < scheduled[-1][0].arrival:
            # An older sequence must not wait until the time of such a decode step is known.
            least = max(least, self._block_tokens)
        if first.arrival > self.unbounded_until:
            cost = self.chunks.cost([seq for seq, _ in scheduled])
            budget = min(budget, max(least, self.chunks.tokens(decoding, waiting, cost)))
        for seq in prefills:
            budget = self._chunk(seq, budget, scheduled)
        while budget > 0 and (admitted := self._admit()) is not None:
            budget = self._chunk(admitted, budget, scheduled)
        return scheduled

    def reserve(self, sequences: Iterable[Sequence], tokens: int) -> bool:
        """Gives each of these running sequences blocks for `tokens` more tokens.

        If too few blocks are free, gives none and returns False: no sequence is preempted for this.
        """
        wanted = [(seq, missing) for seq in sequences if (missing := self._missing(seq, tokens))]
        # The deepest first, because the others can use more blocks.
        wanted.sort(key=lambda one: -one[0].plan.depth)
        for (seq, _), total in zip(
            wanted, itertools.accumulate(missing for _, missing in wanted), strict=True
        ):
            if total > self.pool.free_for(seq.plan.depth):
                return False
        for seq, missing in wanted:
            seq.blocks += self.pool.allocate(missing, seq.plan.depth)
        return True

    def advance(self, seq: Sequence, count: int) -> None:
        """Notes that the KV of a sequence's next `count` tokens is in its blocks.

        Full blocks are published, unless the sequence is about to leave its plan, which no new sequence uses.
        """
        before = seq.computed // self.pool.block_tokens
        seq.computed += count
        full = seq.computed // self.pool.block_tokens
        if self._copy_block is not None and full > before and seq.next_plan is None:
            digests = seq.digests(self.pool.block_tokens)
            for index in range(before, full):
                self.pool.publish(seq.blocks[index], digests[index], seq.plan.depth)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, wherever it is, and frees its blocks at once."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.state = SequenceState.FINISHED

    def preempt(self, seq: Sequence) -> None:
        """Returns a running sequence to the queue, to be recomputed under its next plan if it has one."""
        self.running.remove(seq)
        self._release(seq)
        seq.state = SequenceState.WAITING
        if seq.next_plan is not None:
            seq.change_plan(seq.next_plan)
            seq.next_plan = None
        seq.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, seq, key=lambda waiting: waiting.arrival)

    def preempt_all(self) -> int:
        """Preempts every running sequence. Returns the arrival number of the youngest, or -1."""
        last = self.running[-1].arrival if self.running else -1
        while self.running:
            self.preempt(self.running[-1])
        return last

    def _make_room(self) -> None:
        """Preempts the youngest sequence if the first in the queue is older.

        That first one was preempted itself, and blocks that it shared with others are not free.
        """
        if not (self.waiting and self.running):
            return
        first = self.waiting[0]
        if self.running[-1].arrival < first.arrival:
            return
        needed, depth = self.pool.blocks_for(len(first.token_ids)), first.plan.depth
        while needed > self.pool.free_for(depth) and (last := self._last_with_blocks(depth)) is not None:
            if last.arrival < first.arrival:
                return
            self.preempt(last)

    def _admit(self) -> Sequence | None:
        """Admits the first of the queue to the batch, or else one that takes no memory from it.

        Returns None without a place or memory for them.
        """
        if not self.waiting or self.waiting[0].route is not None or len(self.running) >= self._max_running:
            return None
        # First come, first served, even if the first still waits for its plan.
        seq: Sequence | None = self.waiting[0]
        if not self._give_blocks(self.waiting[0]):
            seq = self._next_beside(self.waiting[0])
        if seq is None:
            return None
        self.waiting.remove(seq)
        seq.state = SequenceState.RUNNING
        seq.times.scheduled = seq.times.scheduled or time.time_ns()
        insort(self.running, seq, key=lambda running: running.arrival)
        return seq

    def _next_beside(self, first: Sequence) -> Sequence | None:
        """Gives blocks that `first` cannot use to the next sequence with fewer layers. Returns it, or None.

        So these blocks do not lie idle while `first` waits for others.
        """
        pool, depth = self.pool, first.plan.depth
        limit, free = pool.limit(depth), pool.free_for(depth)
        if pool.free_blocks == free:
            return None
        others = (seq for seq in self.waiting if seq.route is None and pool.limit(seq.plan.depth) > limit)
        if (seq := next(others, None)) is None or not self._give_blocks(seq):
            return None
        if pool.free_for(depth) < free:
            self.cached_tokens -= seq.computed
            self._release(seq)
            return None
        return seq

    def _chunk(self, seq: Sequence, budget: int, scheduled: list[tuple[Sequence, int]]) -> int:
        count = min(seq.pending, budget)
        if count > 0:
            scheduled.append((seq, count))
        return budget - max(count, 0)

    def _give_blocks(self, seq: Sequence) -> bool:
        """Gives a sequence blocks for all its tokens. If too few are free, gives none and returns False."""
        pool, tokens, depth = self.pool, len(seq.token_ids), seq.plan.depth
        shared = [] if self._copy_block is None else pool.reuse(seq.digests(pool.block_tokens), depth)
        computed = len(shared) * pool.block_tokens
        if self._copy_block is not None and computed == tokens:
            # The last token must be computed to get the next one, but not in a block that others read.
            source = shared.pop()
            computed -= pool.block_tokens
            if pool.free_for(depth):
                target = pool.allocate(1, depth)[0]
                self._copy_block(source, target)
                shared.append(target)
                computed = tokens - 1
            pool.free([source])
        missing = pool.blocks_for(tokens) - len(shared)
        if missing > pool.free_for(depth):
            pool.free(shared)
            return False
        seq.blocks, seq.computed = [*shared, *pool.allocate(missing, depth)], computed
        self.cached_tokens += computed
        return True

    def _secure_blocks(self) -> None:
        """Gives running sequences the blocks that they need, oldest first. May preempt the youngest."""
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            if missing := self._missing(seq):
                depth = seq.plan.depth
                if missing > self.pool.free_for(depth):
                    # There is one: at least this sequence itself.
                    self.preempt(self._last_with_blocks(depth) or seq)
                    continue
                seq.blocks += self.pool.allocate(missing, depth)
            index += 1

    def _last_with_blocks(self, depth: int) -> Sequence | None:
        """The youngest running sequence with a block that a sequence of this depth can use."""
        limit = self.pool.limit(depth)
        return next((seq for seq in reversed(self.running) if min(seq.blocks) < limit), None)

    def _missing(self, seq: Sequence, more: int = 0) -> int:
        """Number of blocks that a sequence lacks for its tokens and `more` additional ones."""
        # Called for each sequence in each step, and most lack none, so it avoids calls to other objects.
        tokens = len(seq.token_ids) + more - len(seq.blocks) * self._block_tokens
        return -(-tokens // self._block_tokens) if tokens > 0 else 0

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.blocks)
        seq.blocks = []
        seq.computed = 0
        seq.probed = None
