"""The second part of a reload, after its plan is loaded: running sequences move to the new plan.

If the new plan only has fewer layers of the same checkpoint, it takes over between two steps, because the KV
of the remaining layers stays valid. For any other plan the KV must be recomputed. If the KV of both plans
fits into one cache, decoding sequences continue under the old plan. They are sent back to be recomputed a few
at a time, oldest first, so none pauses for longer than its own prefill takes. Otherwise (on a GPU, or if the
heads have another shape) all are recomputed at once.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from helios.engine.backends.kv_cache import KVCache
from helios.engine.interface import Reloaded
from helios.engine.plan import Plan
from helios.engine.scheduling.block_pool import BlockPool
from helios.engine.scheduling.chunk_budget import ChunkBudget
from helios.engine.scheduling.scheduler import Scheduler
from helios.engine.scheduling.sequence import Sequence, SequenceState
from helios.engine.settings import EngineSettings
from helios.errors import HeliosError, OutOfMemoryError, UnavailableError
from helios.modes import ExitMode
from helios.served import ServedPlan


@dataclass(slots=True)
class Reload:
    """A loaded plan that is to be put in force, and the result. `done` is set when the reload has ended."""

    plan: Plan
    done: threading.Event = field(default_factory=threading.Event)
    result: Reloaded | HeliosError = field(
        default_factory=lambda: UnavailableError("the engine stopped before all were under the new plan")
    )

    def end(self, result: Reloaded | HeliosError) -> None:
        """Stores the result and wakes whoever waits for it."""
        self.result = result
        self.done.set()


class Move:
    """Moves sequences from one plan to another, for which the KV in their blocks is not valid."""

    def __init__(
        self,
        scheduler: Scheduler,
        before: ServedPlan,
        to: ServedPlan,
        step_token_budget: int,
        last_step: float,
    ) -> None:
        """last_step: end of the last step, on the clock of time.monotonic."""
        self.before, self.to = before, to
        self._scheduler, self._step_token_budget = scheduler, step_token_budget
        # Sequences that will continue under the new plan, and the longest time that one of them got no token.
        self.sequences, self.stall_seconds = len(scheduler.running), 0.0
        # Time of the last token, for each sequence that has no token under the new plan yet.
        self._last_token = {seq: last_step for seq in scheduler.running if seq.is_decoding}
        # Whether some sequences still run under the old plan.
        self.is_leaving = False
        # Number of their tokens that may be recomputed by now.
        self._credit = 0

    def begin(self, num_blocks: int, chunks: ChunkBudget) -> None:
        """Lets decoding sequences continue under the old plan, and sends all others back.

        num_blocks: size of the pool from now on. chunks: chunk budget of the steps under the new plan.
        """
        scheduler = self._scheduler
        for seq in reversed([seq for seq in scheduler.running if seq.plan == self.before]):
            if seq.is_decoding and max(seq.blocks) < num_blocks:
                seq.next_plan = self.to
                self.is_leaving = True
            else:
                scheduler.preempt(seq)
        self.begin_with_waiting(num_blocks, chunks)

    def begin_with_waiting(self, num_blocks: int, chunks: ChunkBudget) -> None:
        """Like `begin`, when no sequence runs. Waiting sequences have no KV and simply change their plan."""
        for seq in self._scheduler.waiting:
            if seq.plan == self.before:
                seq.plan = self.to
        self._scheduler.pool.renew(num_blocks)
        self._scheduler.chunks = chunks

    def send_back(self) -> int:
        """Sends sequences back to be recomputed, oldest first, as fast as steps have room for them.

        They get half of the room if other sequences also wait for prefill. None is sent while an older
        sequence is still being recomputed. Returns how many prompt tokens the next step should at least take
        for them, so that a sequence slightly longer than a chunk is still computed in one step.
        """
        if not self.is_leaving:
            return 0
        scheduler = self._scheduler
        leaving = deque(seq for seq in scheduler.running if seq.next_plan is not None)
        if not leaving:
            self.is_leaving = False
            return 0
        decoding = sum(seq.pending == 1 for seq in scheduler.running)
        room = max(1, min(scheduler.chunks.tokens(decoding), self._step_token_budget - decoding))
        prefills = [seq for seq in scheduler if seq.pending > 1]
        earned = -(-room // 2) if prefills else room
        # Credit may accumulate for one sequence, but not for many at once.
        self._credit = min(self._credit + earned, max(room, len(leaving[0].token_ids)))
        sent = 0
        if not any(seq.arrival < leaving[0].arrival for seq in prefills):
            while leaving and (tokens := len(leaving[0].token_ids)) <= self._credit:
                self._credit -= tokens
                sent += tokens
                scheduler.preempt(leaving.popleft())
        self.is_leaving = bool(leaving)
        return sent if sent <= 2 * room else 0

    def note_tokens(self, readers: list[Sequence], plan: ServedPlan) -> None:
        """Notes that these sequences get a token now, under this plan."""
        now = time.monotonic()
        for seq in readers:
            if (last := self._last_token.pop(seq, None)) is not None:
                self.stall_seconds = max(self.stall_seconds, now - last)
                if plan != self.to:
                    self._last_token[seq] = now

    @property
    def is_done(self) -> bool:
        """Whether all sequences that were generating now generate under the new plan, or wait for memory."""
        return not self.is_leaving and not any(seq.state is SequenceState.RUNNING for seq in self._last_token)


class ServedPlans:
    """The plan in force, during a move also the old plan, and the scheduler and cache that they share.

    All methods run on the engine's thread, between two steps.
    """

    def __init__(self, plan: Plan, settings: EngineSettings) -> None:
        """Allocates the KV cache. Raises OutOfMemoryError."""
        self._settings = settings
        # New sequences get this plan.
        self.in_force = plan
        # All plans of current sequences. The one in force comes last.
        self._plans = {plan.served: plan}
        self.cache = self._allocate(plan, None)
        # No sharing in exit mode dynamic: the KV of generated tokens is an estimate, the KV of prompts is
        # exact.
        shares = settings.prefix_cache and settings.exit_mode is not ExitMode.DYNAMIC
        self.scheduler = Scheduler(
            BlockPool(plan.memory.num_blocks, settings.block_tokens),
            settings.max_running,
            settings.step_token_budget,
            ChunkBudget(settings.prefill_stretch, settings.block_tokens, settings.step_token_budget),
            copy_block=self._copy_block if shares else None,
        )
        self._reload: Reload | None = None
        self.move: Move | None = None

    def grouped(self, scheduled: list[tuple[Sequence, int]]) -> list[tuple[Plan, list[tuple[Sequence, int]]]]:
        """Groups scheduled sequences by their plan."""
        if len(self._plans) == 1:
            return [(self.in_force, scheduled)]
        parts: dict[ServedPlan, list[tuple[Sequence, int]]] = {served: [] for served in self._plans}
        for one in scheduled:
            parts[one[0].plan].append(one)
        return [(self._plans[served], part) for served, part in parts.items() if part]

    def take_over(self, reload: Reload, last_step: float) -> None:
        """Puts a loaded plan in force. Running sequences move to it from now on, until `end_move`.

        last_step: end of the last step, on the clock of time.monotonic. On an error the current plan stays in
        force, and the reload ends with the error.
        """
        began = time.monotonic()
        before, new, running = self.in_force, reload.plan, len(self.scheduler.running)
        try:
            if new.checkpoint_id == before.checkpoint_id and new.depth <= before.depth:
                self._drop_layers(new)
                reload.end(Reloaded(new.bytes_read, running, time.monotonic() - began))
                return
            move = Move(
                self.scheduler, before.served, new.served, self._settings.step_token_budget, last_step
            )
            if self._can_hold_both(new):
                self._begin_move(move, new)
            else:
                self._replace(move, new)
            self.move, self._reload = move, reload
        except HeliosError as error:
            reload.end(error)
        finally:
            # Even if an error stops the loop, whoever waits for the reload is told.
            if self._reload is not reload:
                reload.done.set()

    def send_back(self) -> int:
        """Calls `Move.send_back` during a move. Otherwise returns 0."""
        return 0 if self.move is None else self.move.send_back()

    def end_move(self) -> None:
        """Ends the move if all have moved. Called after `Scheduler.schedule`, which starts some of them."""
        if self.move is None or self._reload is None or not self.move.is_done:
            return
        move, reload, self.move, self._reload = self.move, self._reload, None, None
        self._plans = {self.in_force.served: self.in_force}
        self._settle()
        reload.end(Reloaded(self.in_force.bytes_read, move.sequences, move.stall_seconds))

    def abandon_move(self) -> None:
        """Wakes whoever waits for the reload, because the move will never end."""
        if self._reload is not None:
            self._reload.done.set()
        self._reload = self.move = None

    def _drop_layers(self, new: Plan) -> None:
        """Serves fewer layers of the same checkpoint. The KV of the lower layers stays valid."""
        self.scheduler.chunks = self._chunk_budget(new)
        self.in_force.runner.release()
        self.in_force, self._plans = new, {new.served: new}
        for seq in self.scheduler:
            seq.plan = new.served
        self._settle()

    def _can_hold_both(self, new: Plan) -> bool:
        """Whether the KV of the plan in force and of another plan can use the same blocks."""
        config, cache = new.model.config, self.cache
        return (
            cache.is_in_place
            and cache.has_room_for(
                new.memory.num_blocks, config.num_kv_heads, config.head_dim, new.model.kv_dtype
            )
            # With equal names sequences could not tell the plans apart: the checkpoint's files have changed.
            and new.served != self.in_force.served
        )

    def _begin_move(self, move: Move, new: Plan) -> None:
        """Puts a plan in force while the old one still runs. Raises OutOfMemoryError.

        Until the move ends, the cache has as many layers as the deeper plan, and only the blocks that both
        plans have.
        """
        before, had = self.in_force, self.scheduler.pool.num_blocks
        num_blocks = min(new.memory.num_blocks, had)
        try:
            self.cache.resize(max(new.depth, before.depth), num_blocks)
        except (RuntimeError, MemoryError, OSError) as error:
            self.cache.resize(before.depth, had)
            raise _no_room(num_blocks, error) from error
        move.begin(num_blocks, self._chunk_budget(new))
        self.in_force = self._plans[new.served] = new

    def _replace(self, move: Move, new: Plan) -> None:
        """Puts a plan in force and recomputes all sequences at once. Raises OutOfMemoryError."""
        before, scheduler = self.in_force, self.scheduler
        scheduler.unbounded_until = max(scheduler.preempt_all(), scheduler.unbounded_until)
        # The old KV is freed before the new KV is allocated: together they would exceed a GPU's budget.
        before.runner.release()
        self.cache.resize(0, 0)
        try:
            self.cache = self._allocate(new, self.cache)
        except OutOfMemoryError:
            self.cache = self._allocate(before, self.cache)
            scheduler.pool.renew(before.memory.num_blocks)
            raise
        move.begin_with_waiting(new.memory.num_blocks, self._chunk_budget(new))
        self.in_force, self._plans = new, {new.served: new}

    def _settle(self) -> None:
        """Gives the plan in force, now the only one, its own number of layers and blocks."""
        plan, cache, spare = self.in_force, self.cache, self.in_force.runner.spare_blocks
        cache.resize(plan.depth, plan.memory.num_blocks + spare)
        self.scheduler.pool.grow(cache.num_blocks - spare)
        self.scheduler.chunks.settle()

    def _chunk_budget(self, new: Plan) -> ChunkBudget:
        """A chunk budget for another plan, with step times estimated from those of the plan in force."""
        settings = self._settings
        chunks = ChunkBudget(settings.prefill_stretch, settings.block_tokens, settings.step_token_budget)
        sizes = [plan.model.config.step_parameters(plan.depth) for plan in (new, self.in_force)]
        chunks.expect(self.scheduler.chunks, sizes[0] / sizes[1])
        return chunks

    def _allocate(self, plan: Plan, before: KVCache | None) -> KVCache:
        """A cache for a plan. Reuses the one before if it has room. Raises OutOfMemoryError."""
        config, kept = plan.model.config, plan.model.kv_dtype
        num_blocks = plan.memory.num_blocks + plan.runner.spare_blocks
        try:
            if before is not None and before.has_room_for(
                num_blocks, config.num_kv_heads, config.head_dim, kept
            ):
                before.resize(plan.depth, num_blocks)
                return before
            return KVCache.of(
                config,
                plan.depth,
                num_blocks,
                self._settings.block_tokens,
                kept,
                plan.model.device,
                most_blocks=plan.memory.most_blocks,
                # Not during a reload, because streams wait meanwhile.
                commit=before is None,
            )
        except (RuntimeError, MemoryError, OSError) as error:
            raise _no_room(num_blocks, error) from error

    def _copy_block(self, source: int, target: int) -> None:
        self.cache.copy(source, target)


def _no_room(num_blocks: int, error: BaseException) -> OutOfMemoryError:
    return OutOfMemoryError(f"no memory for {num_blocks} blocks of KV: {error}")
