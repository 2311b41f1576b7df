"""Continuous batching: which sequences run in the next step, and how many tokens of each.

Decoding sequences come first, one token each, so that a long prompt cannot stall them; prefills share
what is left of the step's token budget in chunks, oldest first. A sequence is admitted when the pool has
blocks for all its tokens. When a running one needs a block and none is free, the youngest running
sequence is preempted: its blocks are freed, and it waits to be recomputed (Kwon et al. 2023, section 4.5).
The oldest is never preempted for a younger one, so every sequence ends.

After a reload whose plan needs other keys and values, sequences go on under the plan before and are sent
back to be recomputed a few at a time, oldest first: none stands still for longer than its own prefill takes.

What this or an earlier sequence has computed of the same beginning is not computed again: its full blocks
are shared (`BlockPool`).
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from helios.engine.scheduling.block_pool import BlockPool
from helios.engine.scheduling.chunk_budget import ChunkBudget
from helios.engine.scheduling.sequence import Sequence, SequenceState


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
        # Up to this arrival sequences were under way when a reload had all computed anew at once.
        self.moved_until = -1
        # Whether some that run are outdated, and how many tokens of them may be computed anew by now.
        self.moving = False
        self._credit = 0
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
        least = self._send_back() if self.moving else 0
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
        # Who was sent back is older than prompts that are under way.
        while prefills and self.waiting and self.waiting[0].arrival < prefills[-1].arrival:
            if (admitted := self._admit()) is None:
                break
            insort(prefills, admitted, key=lambda seq: seq.arrival)
        first = prefills[0] if prefills else self.waiting[0]
        if scheduled and first.arrival < scheduled[-1][0].arrival:
            # Whoever is older than one that decodes does not wait for a step that tells what such steps take.
            least = max(least, self._block_tokens)
        # Those that a reload has made stand still go first: chunks as for new prompts would keep them longer.
        if first.arrival > self.moved_until:
            budget = min(budget, max(least, self.chunks.tokens(decoding, waiting)))
        for seq in prefills:
            budget = self._chunk(seq, budget, scheduled)
        while budget > 0 and (admitted := self._admit()) is not None:
            budget = self._chunk(admitted, budget, scheduled)
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
        if self._copy_block is not None and full > before and not seq.outdated:
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

    def outdate(self, num_blocks: int, chunks: ChunkBudget) -> None:
        """Begins to move all sequences to another plan, for which nothing that is in the blocks holds.

        Those that decode go on under the plan before until `schedule` sends them back; the others are sent
        back here. The pool has `num_blocks` blocks from now on.
        """
        for seq in reversed(self.running.copy()):
            seq.outdated = seq.is_decoding and max(seq.blocks) < num_blocks
            if not seq.outdated:
                self._preempt(seq)
        self.moving = bool(self.running)
        self._credit = 0
        self.pool.renew(num_blocks)
        self.chunks = chunks

    def preempt_all(self) -> int:
        """Sends every running sequence back to the queue, to be recomputed. The last one's arrival."""
        last = self.running[-1].arrival if self.running else -1
        while self.running:
            self._preempt(self.running[-1])
        return last

    def _send_back(self) -> int:
        """Sends outdated sequences back to the queue, oldest first, as fast as steps have room for them.

        Half of the room, where others wait as well; none while one that was sent is not done. Returns how
        many tokens of them the step is to compute: what does not quite fit is computed whole all the same.
        """
        outdated = deque(seq for seq in self.running if seq.outdated)
        if not outdated:
            self.moving = False
            return 0
        decoding = sum(seq.pending == 1 for seq in self.running)
        room = max(1, min(self.chunks.tokens(decoding), self._step_token_budget - decoding))
        prefills = [seq for seq in (*self.running, *self.waiting) if seq.pending > 1]
        earned = -(-room // 2) if prefills else room
        # Saved up for one sequence, not for many at once.
        self._credit = min(self._credit + earned, max(room, len(outdated[0].token_ids)))
        sent = 0
        if not any(seq.arrival < outdated[0].arrival for seq in prefills):
            while outdated and (tokens := len(outdated[0].token_ids)) <= self._credit:
                self._credit -= tokens
                sent += tokens
                self._preempt(outdated.popleft())
        self.moving = bool(outdated)
        return sent if sent <= 2 * room else 0

    def _make_room(self) -> None:
        """Preempts the youngest for the first in the queue where that one is older: it was sent back, and
        blocks that it shared are not free yet."""
        if not (self.waiting and self.running):
            return
        first = self.waiting[0]
        needed = self.pool.blocks_for(len(first.token_ids))
        while self.running and self.running[-1].arrival > first.arrival and needed > self.pool.free_blocks:
            self._preempt(self.running[-1])

    def _admit(self) -> Sequence | None:
        """Takes the first of the queue into the batch; None where there is no place or no memory for it."""
        # First come, first served: nobody overtakes it.
        if not self.waiting or len(self.running) >= self._max_running:
            return None
        if not self._give_blocks(self.waiting[0]):
            return None
        seq = self.waiting.popleft()
        seq.state = SequenceState.RUNNING
        seq.times.scheduled = seq.times.scheduled or time.time_ns()
        insort(self.running, seq, key=lambda running: running.arrival)
        return seq

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
        seq.outdated = False
        seq.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, seq, key=lambda waiting: waiting.arrival)

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.blocks)
        seq.blocks = []
        seq.computed = 0
