"""The second part of a reload, after its plans are loaded: running sequences move to them.

A sequence whose plan stays in force keeps it. One that only needs fewer layers of the same checkpoint from
now on changes its plan between two steps, because the KV of the remaining layers stays valid. For any other
plan the KV must be recomputed. If the KV of the old and the new plans fits into one cache, decoding sequences
continue under their old plan. They are sent back to be recomputed a few at a time, oldest first, so none
pauses for longer than its own prefill takes. Otherwise (on a GPU, or if the heads have another shape) all are
recomputed at once.
"""

import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from helios.engine.backends.kv_cache import KVCache
from helios.engine.interface import Reloaded
from helios.engine.plan import Plan, bytes_read_for
from helios.engine.scheduling.block_pool import BlockPool
from helios.engine.scheduling.chunk_budget import ChunkBudget
from helios.engine.scheduling.scheduler import Scheduler
from helios.engine.scheduling.sequence import Sequence, SequenceState
from helios.engine.settings import EngineSettings
from helios.errors import HeliosError, OutOfMemoryError, PlanNotServedError, UnavailableError
from helios.modes import ExitMode
from helios.served import ServedPlan, successor


@dataclass(slots=True)
class Reload:
    """Loaded plans that are to be put in force, and the result. `done` is set when the reload has ended."""

    plans: tuple[Plan, ...]
    done: threading.Event = field(default_factory=threading.Event)
    result: Reloaded | HeliosError = field(
        default_factory=lambda: UnavailableError("the engine stopped before all were under the new plan")
    )

    def end(self, result: Reloaded | HeliosError) -> None:
        """Stores the result and wakes whoever waits for it."""
        self.result = result
        self.done.set()


class Move:
    """Moves sequences to other plans, for which the KV in their blocks is not valid."""

    def __init__(
        self,
        scheduler: Scheduler,
        to: Mapping[ServedPlan, ServedPlan],
        step_token_budget: int,
        last_step: float,
    ) -> None:
        """to: the new plan, by old plan. last_step: end of the last step, on the clock of time.monotonic."""
        self._to, self._scheduler, self._step_token_budget = to, scheduler, step_token_budget
        moving = [seq for seq in scheduler.running if seq.plan in to]
        # Sequences that will continue under a new plan, and the longest time that one of them got no token.
        self.sequences, self.stall_seconds = len(moving), 0.0
        # Time of the last token, for each sequence that has no token under its new plan yet.
        self._last_token = {seq: last_step for seq in moving if seq.is_decoding}
        # Whether some sequences still run under an old plan.
        self.is_leaving = False
        # Number of their tokens that may be recomputed by now.
        self._credit = 0

    def begin(self, layer_blocks: Seq[int], chunks: ChunkBudget) -> None:
        """Lets decoding sequences continue under their old plan, and sends all others back.

        layer_blocks: number of blocks of each layer from now on. chunks: chunk budget of the steps under the
        new plans.
        """
        scheduler = self._scheduler
        for seq in reversed([seq for seq in scheduler.running if seq.plan in self._to]):
            if seq.is_decoding and _has_room(seq, layer_blocks):
                seq.next_plan = self._to[seq.plan]
                self.is_leaving = True
            else:
                scheduler.preempt(seq)
        self.begin_with_waiting(layer_blocks, chunks)

    def begin_with_waiting(self, layer_blocks: Seq[int], chunks: ChunkBudget) -> None:
        """Like `begin`, when no sequence that runs moves. Waiting ones have no KV and only change plans."""
        change_plans(self._scheduler.waiting, self._to)
        resize_pool(self._scheduler, layer_blocks)
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
        decoding = [seq for seq in scheduler.running if seq.pending == 1]
        fitting = scheduler.chunks.tokens(len(decoding), cost=scheduler.chunks.cost(decoding))
        room = max(1, min(fitting, self._step_token_budget - len(decoding)))
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

    def note_tokens(self, readers: Iterable[Sequence]) -> None:
        """Notes that these sequences get a token now, under their plan."""
        now = time.monotonic()
        for seq in readers:
            if (last := self._last_token.pop(seq, None)) is not None:
                self.stall_seconds = max(self.stall_seconds, now - last)
                if seq.next_plan is not None:
                    self._last_token[seq] = now

    @property
    def is_done(self) -> bool:
        """Whether all sequences that were generating now generate under a new plan, or wait for memory."""
        return not self.is_leaving and not any(seq.state is SequenceState.RUNNING for seq in self._last_token)


def change_plans(sequences: Iterable[Sequence], to: Mapping[ServedPlan, ServedPlan]) -> None:
    """Gives sequences their new plan, by old plan. What they have computed must be valid for it."""
    for seq in sequences:
        if (plan := to.get(seq.plan)) is not None:
            seq.change_plan(plan)


def resize_pool(scheduler: Scheduler, layer_blocks: Seq[int]) -> None:
    """Changes the number of blocks of each layer. Sequences that hold other blocks are sent back."""
    for seq in reversed(scheduler.running.copy()):
        if not _has_room(seq, layer_blocks):
            scheduler.preempt(seq)
    scheduler.pool.resize(layer_blocks)


def _has_room(seq: Sequence, layer_blocks: Seq[int]) -> bool:
    """Whether all blocks of a running sequence still have the layers that it needs."""
    return max(seq.blocks) < layer_blocks[seq.plan.depth - 1]


class ServedPlans:
    """The plans in force, during a move also the old ones, and the scheduler and cache that they share.

    All methods run on the engine's thread, between two steps.
    """

    def __init__(self, plans: Seq[Plan], settings: EngineSettings) -> None:
        """Allocates the KV cache. Raises OutOfMemoryError."""
        self._settings = settings
        # New sequences get the first one unless they name another.
        self.in_force = tuple(plans)
        # All plans of current sequences. Those in force come last.
        self._plans = _by_name(plans)
        self.cache = self._allocate(self.in_force, None)
        # No sharing in exit mode dynamic: the KV of generated tokens is an estimate, the KV of prompts is
        # exact.
        shares = settings.prefix_cache and settings.exit_mode is not ExitMode.DYNAMIC
        memory = self.in_force[0].memory
        self.scheduler = Scheduler(
            BlockPool(memory.num_blocks, settings.block_tokens),
            settings.max_running,
            settings.step_token_budget,
            self._new_chunks(self.in_force),
            copy_block=self._copy_block if shares else None,
        )
        self.scheduler.pool.resize(memory.layer_blocks)
        self._reload: Reload | None = None
        self.move: Move | None = None

    def grouped(self, scheduled: list[tuple[Sequence, int]]) -> list[tuple[Plan, list[tuple[Sequence, int]]]]:
        """Groups scheduled sequences that one call of a runner computes, each with one of its plans."""
        if len(self._plans) == 1:
            return [(self.in_force[0], scheduled)]
        parts: dict[tuple[int, int], tuple[Plan, list[tuple[Sequence, int]]]] = {}
        for one in scheduled:
            plan = self._plans[one[0].plan]
            key = id(plan.runner), 0 if plan.runner.mixes_depths else plan.depth
            parts.setdefault(key, (plan, []))[1].append(one)
        return list(parts.values())

    def is_in_force(self, plan: Plan) -> bool:
        """Whether new sequences may get a plan."""
        return any(one is plan for one in self.in_force)

    def of(self, served: ServedPlan) -> Plan:
        """The plan in force with this name. Raises PlanNotServedError."""
        found = next((plan for plan in self.in_force if plan.served == served), None)
        if found is None:
            names = ", ".join(str(plan.served) for plan in self.in_force)
            raise PlanNotServedError(f"{served} is not in force here; in force: {names}")
        return found

    def plan_for(self, seq: Sequence) -> Plan:
        """The plan that a sequence has now, or that it gets if its own is no longer in force."""
        return self.of(successor(seq.next_plan or seq.plan, [plan.served for plan in self.in_force]))

    def take_over(self, reload: Reload, last_step: float) -> None:
        """Puts loaded plans in force. Running sequences move to them from now on, until `end_move`.

        last_step: end of the last step, on the clock of time.monotonic. On an error the current plans stay in
        force, and the reload ends with the error.
        """
        began = time.monotonic()
        new, names = reload.plans, _by_name(reload.plans)
        to = {plan.served: successor(plan.served, list(names)) for plan in self.in_force}
        # Plans whose KV is valid for the next plan too.
        kept = {
            plan.served
            for plan in self.in_force
            if plan.checkpoint_id == names[to[plan.served]].checkpoint_id
            and plan.depth >= to[plan.served].depth
        }
        moved = sum(seq.plan not in names for seq in self.scheduler.running)
        try:
            if len(kept) == len(to) and self._can_stay(new):
                self._keep(new, to)
                reload.end(Reloaded(bytes_read_for(new), moved, time.monotonic() - began))
                return
            if self._can_hold_both(new):
                self.move = self._begin_move(new, to, kept, last_step)
            else:
                self.move = self._replace(new, to, last_step)
            self._reload = reload
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
        self._plans = _by_name(self.in_force)
        self._settle()
        reload.end(Reloaded(bytes_read_for(self.in_force), move.sequences, move.stall_seconds))

    def abandon_move(self) -> None:
        """Wakes whoever waits for the reload, because the move will never end."""
        if self._reload is not None:
            self._reload.done.set()
        self._reload = self.move = None

    def _keep(self, new: tuple[Plan, ...], to: Mapping[ServedPlan, ServedPlan]) -> None:
        """Serves plans for which the KV of all sequences stays valid. Raises OutOfMemoryError."""
        if self.cache.is_in_place:
            self._resize_cache(new[0].memory.layer_blocks, self.in_force[0].memory.layer_blocks)
        self.scheduler.chunks = self._chunk_budget(new)
        self._release_runners()
        self._put_in_force(new)
        change_plans(self.scheduler, to)
        self._settle()

    def _can_stay(self, new: tuple[Plan, ...]) -> bool:
        """Whether the cache can become that of other plans while it is in use, without more memory."""
        if self.cache.is_in_place:
            return self._can_hold_both(new)
        had, gets = (plans[0].memory.layer_blocks for plans in (self.in_force, new))
        return len(gets) <= len(had) and gets[0] >= had[0]

    def _can_hold_both(self, new: tuple[Plan, ...]) -> bool:
        """Whether the KV of the plans in force and of other plans can use the same blocks."""
        model, cache, had = new[0].model, self.cache, self._plans
        return (
            cache.is_in_place
            and cache.has_room_for(
                new[0].memory.num_blocks, model.config.num_kv_heads, model.config.head_dim, model.kv_dtype
            )
            # With equal names sequences could not tell the plans apart: the checkpoint's files have changed.
            and not any(
                plan.served in had and plan.checkpoint_id != had[plan.served].checkpoint_id for plan in new
            )
        )

    def _begin_move(
        self,
        new: tuple[Plan, ...],
        to: Mapping[ServedPlan, ServedPlan],
        kept: Set[ServedPlan],
        last_step: float,
    ) -> Move:
        """Puts plans in force while old ones still run. Raises OutOfMemoryError.

        kept: plans whose KV is valid for the next plan. Until the move ends, the cache has as many layers as
        the deepest plan, and of each layer only the blocks that it has both before and after.
        """
        scheduler, before = self.scheduler, self.in_force
        layer_blocks = _common(*(plans[0].memory.layer_blocks for plans in (before, new)))
        self._resize_cache(layer_blocks, before[0].memory.layer_blocks)
        checkpoints = {plan.served.model: plan.checkpoint_id for plan in before}
        if any(checkpoints.get(plan.served.model, plan.checkpoint_id) != plan.checkpoint_id for plan in new):
            # Digests name a model, but not which files it had.
            scheduler.pool.forget()
        leaving = {old: plan for old, plan in to.items() if old not in kept}
        move = Move(scheduler, leaving, self._settings.step_token_budget, last_step)
        move.sequences += sum(seq.plan in kept and seq.plan != to[seq.plan] for seq in scheduler.running)
        change_plans(scheduler, {old: plan for old, plan in to.items() if old in kept})
        move.begin(layer_blocks, self._chunk_budget(new))
        self._put_in_force(new, [plan for plan in before if plan.served in leaving])
        return move

    def _replace(self, new: tuple[Plan, ...], to: Mapping[ServedPlan, ServedPlan], last_step: float) -> Move:
        """Puts plans in force and recomputes all sequences at once. Raises OutOfMemoryError."""
        before, scheduler = self.in_force, self.scheduler
        move = Move(scheduler, to, self._settings.step_token_budget, last_step)
        scheduler.unbounded_until = max(scheduler.preempt_all(), scheduler.unbounded_until)
        # The old KV is freed before the new KV is allocated: together they would exceed a GPU's budget.
        self._release_runners()
        scheduler.pool.forget()
        self.cache.resize([])
        try:
            self.cache = self._allocate(new, self.cache)
        except OutOfMemoryError:
            self.cache = self._allocate(before, self.cache)
            raise
        move.begin_with_waiting(new[0].memory.layer_blocks, self._chunk_budget(new))
        self._put_in_force(new)
        return move

    def _put_in_force(self, plans: tuple[Plan, ...], leaving: Seq[Plan] = ()) -> None:
        """leaving: other plans that sequences still have."""
        self.in_force = plans
        self._plans = _by_name((*leaving, *plans))

    def _settle(self) -> None:
        """Gives the plans in force, now the only ones, their own numbers of layers and blocks."""
        plan = self.in_force[0]
        spare, layer_blocks = plan.runner.spare_blocks, plan.memory.layer_blocks
        self.cache.resize([count + spare for count in layer_blocks])
        # A GPU may not have had the memory for all.
        layers = zip(layer_blocks, self.cache.keys, strict=True)
        resize_pool(self.scheduler, [min(count, len(keys) - spare) for count, keys in layers])
        self.scheduler.chunks.settle()

    def _resize_cache(self, layer_blocks: Seq[int], before: Seq[int]) -> None:
        """Resizes the cache of a CPU. Raises OutOfMemoryError, and leaves it as it was before."""
        try:
            self.cache.resize(layer_blocks)
        except (RuntimeError, MemoryError, OSError) as error:
            self.cache.resize(before)
            raise _no_room(layer_blocks[0], error) from error

    def _release_runners(self) -> None:
        for plan in self.in_force:
            plan.runner.release()

    def _new_chunks(self, plans: Seq[Plan]) -> ChunkBudget:
        settings = self._settings
        costs = {plan.served: _step_size(plan) / _step_size(plans[0]) for plan in plans}
        return ChunkBudget(
            settings.prefill_stretch,
            settings.block_tokens,
            settings.step_token_budget,
            costs if len(costs) > 1 else {},
        )

    def _chunk_budget(self, new: Seq[Plan]) -> ChunkBudget:
        """A chunk budget for other plans, with step times estimated from those of the plans in force."""
        chunks = self._new_chunks(new)
        chunks.expect(self.scheduler.chunks, _step_size(new[0]) / _step_size(self.in_force[0]))
        return chunks

    def _allocate(self, plans: Seq[Plan], before: KVCache | None) -> KVCache:
        """A cache for plans. Reuses the one before if it has room. Raises OutOfMemoryError."""
        first, memory = plans[0], plans[0].memory
        config, kept = first.model.config, first.model.kv_dtype
        layer_blocks = [count + first.runner.spare_blocks for count in memory.layer_blocks]
        try:
            if before is not None and before.has_room_for(
                layer_blocks[0], config.num_kv_heads, config.head_dim, kept
            ):
                before.resize(layer_blocks)
                return before
            cache = KVCache.of(
                config,
                0,
                layer_blocks[0],
                self._settings.block_tokens,
                kept,
                first.model.device,
                most_blocks=memory.most_blocks,
                commit=False,
            )
            cache.resize(layer_blocks)
            # Not during a reload, because streams wait meanwhile.
            if before is None:
                cache.commit()
            return cache
        except (RuntimeError, MemoryError, OSError) as error:
            raise _no_room(layer_blocks[0], error) from error

    def _copy_block(self, source: int, target: int) -> None:
        self.cache.copy(source, target)


def _by_name(plans: Seq[Plan]) -> dict[ServedPlan, Plan]:
    return {plan.served: plan for plan in plans}


def _common(before: Seq[int], after: Seq[int]) -> list[int]:
    """The number of blocks of each layer that stay, if layers have had and get these numbers of them.

    A layer that is only there before or after has as many as there, but not more than the layer before it.
    """
    found: list[int] = []
    for counts in itertools.zip_longest(before, after, fillvalue=sys.maxsize):
        found.append(min(*counts, *found[-1:]))
    return found


def _step_size(plan: Plan) -> int:
    """Parameters that a decode step reads."""
    return plan.model.config.step_parameters(plan.depth)


def _no_room(num_blocks: int, error: BaseException) -> OutOfMemoryError:
    return OutOfMemoryError(f"no memory for {num_blocks} blocks of KV: {error}")
