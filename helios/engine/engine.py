"""The engine: submit, cancel, reload, telemetry, around one loop: schedule, run, deliver."""

import itertools
import logging
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from helios.engine.backends.burst import ONE_STEP, Burst, Interrupt
from helios.engine.backends.cuda_graphs import DecodeGraphs
from helios.engine.backends.exits import run_dynamic, run_static
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.readout import Readout
from helios.engine.backends.sampler import Row, Sampled, sample
from helios.engine.memory import device_budget
from helios.engine.move import Reloaded, Swap
from helios.engine.plan import Plan, load_plan
from helios.engine.scheduling.batch import Batch, build_batch
from helios.engine.scheduling.block_pool import BlockPool
from helios.engine.scheduling.chunk_budget import ChunkBudget
from helios.engine.scheduling.detokenizer import Detokenizer, token_texts
from helios.engine.scheduling.prompt_readings import PromptReadings
from helios.engine.scheduling.scheduler import Scheduler
from helios.engine.scheduling.sequence import FinishReason, GeneratedToken, Output, Sequence, SequenceState
from helios.engine.settings import EngineSettings
from helios.engine.weights.loader import Progress
from helios.errors import (
    CancelledError,
    DeadlineExceededError,
    EngineFailedError,
    HeliosError,
    InvalidRequestError,
    OutOfMemoryError,
    OverloadedError,
    SequenceFailedError,
    SettingsError,
    UnavailableError,
)
from helios.modes import ExitMode
from helios.sampling import SamplingParams

log = logging.getLogger(__name__)

Sink = Callable[[Output], None]

# How long an idle loop sleeps at most, seconds.
_IDLE_SECONDS = 0.1


@dataclass(slots=True)
class Counters:
    """What an engine has done since it started."""

    steps: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    finished_sequences: int = 0
    # Tokens whose confidence was below their exit's threshold (high-exit tokens, HT).
    high_exit_tokens: int = 0
    # Tokens generated under the plan of the time, and the sum of their confidences' negative logarithms.
    confidence_tokens: int = 0
    confidence_nats: float = 0.0
    # Prompts of which a sample of tokens was read out, these tokens, and their nats under the plan.
    prompts_read: int = 0
    prompt_tokens_read: int = 0
    prompt_nats: float = 0.0


@dataclass(frozen=True, slots=True)
class Telemetry:
    """An engine's load at one moment. `step_age` is in seconds."""

    model: str
    depth: int
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    counters: Counters
    preemptions: int
    # Tokens that were not computed, because a sequence with the same beginning had been.
    cached_tokens: int
    step_age: float


class Engine:
    """Serves one partial model to many sequences.

    `submit`, `cancel`, `reload` and `telemetry` may be called from any thread. Either one thread calls
    `step` (as `generate` does), or `start` runs the loop in a thread of its own.
    """

    def __init__(self, plan: Plan, settings: EngineSettings) -> None:
        self.settings = settings
        self.plan = plan
        self._lock = threading.Condition()
        self._submitted: deque[Sequence] = deque()
        self._cancelled: dict[str, HeliosError] = {}
        self._swap: Swap | None = None
        # The swap under way: some sequences are still under the plan before.
        self._moving: Swap | None = None
        self._stopping = False
        self._interrupt = Interrupt()
        self._thread: threading.Thread | None = None
        self._sequences: dict[str, Sequence] = {}
        # All plans have the same tokenizer.
        self._token_texts = token_texts(plan.tokenizer)
        self._counters = Counters()
        self._last_step = time.monotonic()
        self._scheduler, self._cache, self._graphs = self._allocate(plan)
        self._reload_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        depth: int | None = None,
        settings: EngineSettings | None = None,
        threshold: float | None = None,
    ) -> Self:
        """Loads the first `depth` layers (None: all) of the checkpoint directory `path`.

        `threshold` goes before the settings' own, until a reload.
        Raises CheckpointError, UnknownDepthError, OutOfMemoryError, SettingsError.
        """
        settings = settings or EngineSettings()
        if settings.memory_bytes is None:
            settings = replace(settings, memory_bytes=device_budget(torch.device(settings.device)))
        return cls(load_plan(Path(path), depth, settings, threshold=threshold), settings)

    # -- requests ---------------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        sink: Sink,
        *,
        emitted_ids: list[int] | None = None,
        deadline: float | None = None,
    ) -> Sequence:
        """Queues a sequence. `sink` gets every Output, on the engine's thread, and must not block.

        What fails for this sequence alone, its sink too, ends it with an error; all others go on.
        `emitted_ids` were generated before (elsewhere, perhaps): the sequence goes on after them.
        `deadline` is on the clock of time.monotonic.
        Raises InvalidRequestError, OverloadedError, UnavailableError, HeliosError if there is no text for
        the emitted ids.
        """
        emitted = emitted_ids or []
        sampling = self._check(prompt_ids, emitted, sampling)
        sequence = Sequence(
            request_id=request_id,
            token_ids=[*prompt_ids, *emitted],
            prompt_tokens=len(prompt_ids),
            sampling=sampling,
            detokenizer=Detokenizer(self.plan.tokenizer, sampling.stop, self._token_texts),
            sink=sink,
            deadline=None if deadline is None else float(deadline),
        )
        try:
            _, ended = self._take(self.plan, sequence, emitted, 0)
        except Exception as error:
            raise _failure(sequence, error) from None
        with self._lock:
            if self._stopping:
                raise UnavailableError("the engine is stopping; send the request to another worker")
            if request_id in self._sequences:
                raise InvalidRequestError(f"request_id {request_id!r} is already running; use another")
            if ended is None:
                waiting = len(self._submitted) + len(self._scheduler.waiting)
                if waiting >= self.settings.max_waiting:
                    raise OverloadedError(
                        f"{waiting} sequences are waiting, the limit is {self.settings.max_waiting}",
                        retry_after_seconds=1.0,
                    )
                self._sequences[request_id] = sequence
                self._submitted.append(sequence)
                self._call()
        if ended is not None:
            sink(Output(finish=sequence.finish(ended)))
        return sequence

    def cancel(self, request_id: str, error: HeliosError | None = None) -> None:
        """Ends a sequence before the next step; its sink gets `error`. Unknown ids are ignored."""
        with self._lock:
            if request_id in self._sequences:
                self._cancelled[request_id] = error or CancelledError("the request was cancelled")
                self._call()

    def generate(
        self, prompt: str | list[int], sampling: SamplingParams | None = None
    ) -> Iterator[GeneratedToken]:
        """Tokens of one prompt as they come; steps the engine itself. Raises HeliosError."""
        if self._thread is not None:
            raise SettingsError("the engine's loop runs in a thread: use submit")
        ids = self.plan.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        outputs: deque[Output] = deque()
        request_id = f"generate-{id(outputs)}"
        self.submit(request_id, ids, sampling or SamplingParams(), outputs.append)
        try:
            while True:
                while not outputs:
                    self.step()
                output = outputs.popleft()
                yield from output.tokens
                if output.error is not None:
                    raise output.error
                if output.finish is not None:
                    return
        finally:
            self.cancel(request_id)

    @property
    def running(self) -> bool:
        """Whether the loop started with `start` is alive."""
        return self._thread is not None and self._thread.is_alive()

    # -- the loop ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Runs the loop in a thread until `stop`."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop; sequences still there get UnavailableError."""
        with self._lock:
            self._stopping = True
            self._call()
        if self._thread is not None:
            self._thread.join()

    @torch.inference_mode()
    def step(self) -> bool:
        """Schedules, runs and delivers one step. False: there was nothing to do."""
        return self._step()

    def _step(self) -> bool:
        began = time.perf_counter()
        self._take_inbox()
        self._expire()
        scheduled = self._scheduler.schedule()
        if self._moving is not None and self._has_moved(self._moving):
            self._end_move(self._moving)
        if not scheduled:
            self._last_step = time.monotonic()
            return False
        decoding = prompt_tokens = 0
        for plan, part in self._by_plan(scheduled):
            batch, steps = self._run(plan, part)
            decoding += batch.decode_rows
            prompt_tokens += batch.rows - batch.decode_rows
        self._counters.steps += steps
        self._counters.prefill_tokens += prompt_tokens
        seconds, chunks = (time.perf_counter() - began) / steps, self._scheduler.chunks
        # What a step under two plans takes says little of either; but prompts wait until something is known.
        if self._moving is None or chunks.decode_seconds(decoding) is None:
            chunks.observe(decoding, prompt_tokens, seconds)
        self._last_step = time.monotonic()
        return True

    def _by_plan(
        self, scheduled: list[tuple[Sequence, int]]
    ) -> list[tuple[Plan, list[tuple[Sequence, int]]]]:
        """What is scheduled, by the plan that it is under: during a move those before and in force."""
        if self._moving is None:
            return [(self.plan, scheduled)]
        before = [one for one in scheduled if one[0].outdated]
        moved = [one for one in scheduled if not one[0].outdated]
        return [(plan, part) for plan, part in ((self._moving.before, before), (self.plan, moved)) if part]

    def _run(self, plan: Plan, scheduled: list[tuple[Sequence, int]]) -> tuple[Batch, int]:
        """Runs and delivers what is scheduled under a plan. The batch, and the steps that it took at once."""
        model, cache = plan.model, self._cache
        compiled = model.has_bursts(cache)
        steps = self._burst(scheduled) if compiled and self._moving is None else 1
        # A plan that sequences leave is not what telemetry tells of.
        readings = PromptReadings(self.settings.prompt_readings if plan is self.plan else 0)
        batch, readers = build_batch(scheduled, self.settings.block_tokens, model.device, readings)
        burst = ONE_STEP
        if compiled:
            ends = model.config.eos_token_ids
            burst = Burst.of(steps, readers, ends, self._interrupt, len(readings.rows))
        if self.settings.exit_mode is ExitMode.DYNAMIC:
            found, exits = run_dynamic(model, batch, cache, plan.thresholds, burst)
        else:
            found, exits = run_static(model, batch, cache, self._graphs, burst)
        if readings.rows:
            self._note_readings(readings, found.rows(slice(len(readers), None)))
            found, exits = found.rows(slice(len(readers))), exits[: len(readers)]
        for seq, tokens in scheduled:
            self._scheduler.advance(seq, tokens)
        if readers:
            rows: dict[int, Row] = {}
            if not compiled:
                rows = {i: Row.of(seq) for i, seq in enumerate(readers) if not seq.takes_likeliest}
            self._deliver(plan, readers, sample(found, rows), exits)
            # A burst may have been ended early.
            steps = len(exits) // len(readers)
        return batch, steps

    def _note_readings(self, readings: PromptReadings, found: Readout) -> None:
        counters, nats = self._counters, readings.nats(found)
        if math.isfinite(nats):
            counters.prompts_read += readings.prompts
            counters.prompt_tokens_read += len(readings.rows)
            counters.prompt_nats += nats

    def _burst(self, scheduled: list[tuple[Sequence, int]]) -> int:
        """How many steps to take at once, with the blocks that they need."""
        if not self.settings.burst_seconds:
            return 1
        left = scheduled[0][0].sampling.max_tokens
        for seq, _ in scheduled:
            if not seq.is_decoding:
                return 1
            left = min(left, seq.sampling.max_tokens - seq.completion_tokens)
        seconds = self._scheduler.chunks.decode_seconds(len(scheduled))
        if seconds is None:
            return 1
        count = max(1, min(left, int(self.settings.burst_seconds / seconds)))
        sequences = (seq for seq, _ in scheduled)
        return count if count == 1 or self._scheduler.reserve(sequences, count - 1) else 1

    def _loop(self) -> None:
        try:
            # Once for all steps: entering it takes as long as scheduling a small batch.
            with torch.inference_mode():
                while not self._stopping:
                    if not self._step():
                        self._wait()
        except Exception as error:
            log.exception("the engine's loop failed")
            self._fail_all(
                EngineFailedError(f"the engine failed: {type(error).__name__}; see the worker's log")
            )
            raise
        self._fail_all(UnavailableError("the worker is stopping"))

    def _wait(self) -> None:
        """Sleeps until there is something to do, but for short: telemetry shows that the loop lives."""
        with self._lock:
            if not (self._submitted or self._cancelled or self._swap or self._stopping):
                self._lock.wait(timeout=_IDLE_SECONDS)

    def _call(self) -> None:
        """Has the loop look at what it was asked for. With the lock."""
        self._interrupt.ask()
        self._lock.notify_all()

    def _take_inbox(self) -> None:
        """Takes in, at the edge between two steps, what other threads asked for."""
        with self._lock:
            self._interrupt.clear()
            submitted, self._submitted = self._submitted, deque()
            cancelled, self._cancelled = self._cancelled, {}
            swap, self._swap = self._swap, None
        for sequence in submitted:
            self._admit(sequence)
        for request_id, error in cancelled.items():
            if (found := self._sequences.get(request_id)) is not None:
                self._end(found, Output(error=error))
        if swap is not None:
            self._apply(swap)

    def _expire(self) -> None:
        now = time.monotonic()
        late = [seq for seq in self._scheduler if seq.deadline is not None and seq.deadline <= now]
        for seq in late:
            error = DeadlineExceededError(
                f"the deadline passed after {seq.completion_tokens} of {seq.sampling.max_tokens} tokens"
            )
            self._end(seq, Output(error=error))

    def _deliver(self, plan: Plan, readers: list[Sequence], sampled: Sampled, exits: list[int]) -> None:
        now, names, count = time.time_ns(), itertools.repeat(plan.entry.name), len(readers)
        threshold_of, outputs = plan.thresholds.get, list[Output]()
        generated, high_exits, doubts = 0, 0, 0.0
        for index, seq in enumerate(readers):
            # Of a burst, all readers' tokens of a step, then those of the next.
            ids, layers, first = sampled.token_ids[index::count], exits[index::count], seq.completion_tokens
            logprobs, confidences = (part[index::count] for part in (sampled.logprobs, sampled.confidences))
            try:
                # NaN if any of them is.
                if not math.isfinite(sum(confidences, sum(logprobs))):
                    raise plan.not_finite(layers, confidences)
                texts, reason = self._take(plan, seq, ids, first)
            except Exception as error:
                outputs.append(Output(error=_failure(seq, error), more=index + 1 < count))
                continue
            made = len(texts)
            seq.token_ids += ids[:made]
            finish = None if reason is None else seq.finish(reason)
            numbers = range(first, first + made)
            # As many as there are texts.
            tokens = tuple(map(GeneratedToken, numbers, ids, texts, logprobs, confidences, layers, names))
            found = zip(confidences[:made], layers, strict=False)
            doubts += sum(map(math.log, confidences[:made]))
            high_exits += sum(confidence < threshold_of(layer, 0.0) for confidence, layer in found)
            if not seq.times.first_token:
                seq.times.first_token = now
            if made > 1:
                # Each step of a burst wrote the keys and values of the token before.
                self._scheduler.advance(seq, made - 1)
            generated += made
            outputs.append(Output(tokens, finish, more=index + 1 < count))
        self._counters.generated_tokens += generated
        # Unsure tokens count against the plan that telemetry tells of.
        if plan is self.plan:
            self._counters.high_exit_tokens += high_exits
            self._counters.confidence_tokens += generated
            self._counters.confidence_nats -= doubts
        if self._moving is not None:
            self._moving.note_tokens(readers, moved=plan is self.plan)
        # In one go, and only when the last is ready: detokenizing lets go of the interpreter's lock.
        for seq, output in zip(readers, outputs, strict=True):
            if output.finish is not None or output.error is not None:
                self._end(seq, output)
                continue
            try:
                seq.sink(output)
            except Exception as error:
                self._end(seq, Output(error=_failure(seq, error)))

    def _end(self, seq: Sequence, output: Output) -> None:
        self._scheduler.finish(seq)
        seq.times.finished = time.time_ns()
        with self._lock:
            del self._sequences[seq.request_id]
        self._counters.finished_sequences += 1
        self._tell(seq, output)

    def _tell(self, seq: Sequence, output: Output) -> None:
        """Gives a sequence's last output to its sink; if that fails, an error instead."""
        try:
            seq.sink(output)
        except Exception as error:
            failure = _failure(seq, error)
            if output.error is None:
                self._tell(seq, Output(error=failure))

    def _fail_all(self, error: HeliosError) -> None:
        with self._lock:
            self._stopping = True
            swaps = (self._swap, self._moving)
            self._swap = self._moving = None
        for swap in swaps:
            if swap is not None:
                swap.done.set()
        self._take_inbox()
        for seq in list(self._scheduler):
            self._end(seq, Output(error=error))

    def _take(
        self, plan: Plan, seq: Sequence, ids: list[int], before: int
    ) -> tuple[list[str], FinishReason | None]:
        """The texts of a sequence's next tokens, `before` having come, up to that which ends it, and why.

        The last one's has what was held back. An end of text has no text, whatever the tokenizer has for it.
        """
        reason, left = None, seq.sampling.max_tokens - before
        if len(ids) >= left:
            ids, reason = ids[:left], FinishReason.LENGTH
        if not seq.sampling.ignore_eos:
            for eos in plan.model.config.eos_token_ids:
                if eos in ids:
                    ids, reason = ids[: ids.index(eos) + 1], FinishReason.EOS
        detokenizer = seq.detokenizer
        texts = detokenizer.push_all(ids if reason is not FinishReason.EOS else ids[:-1])
        if detokenizer.stopped:
            return texts, FinishReason.STOP
        if reason is FinishReason.EOS:
            texts.append("")
        if reason is not None:
            texts[-1] += detokenizer.flush()
        return texts, reason

    # -- the plan ---------------------------------------------------------------------------------

    def reload(
        self,
        path: str | Path,
        depth: int | None = None,
        progress: Progress | None = None,
        threshold: float | None = None,
        *,
        urgent: bool = False,
    ) -> Reloaded:
        """Loads another plan beside the running one and swaps between two steps.

        Weights that both plans have are shared: going deeper loads only the layers that are missing.

        Sequences in flight go on under the new plan: computed again, or, if it is the same model with fewer
        layers, with the KV they have. Who is to be computed again goes on under the old plan until it is its
        turn; where the old KV cannot stay beside the new, on a GPU or with heads of another shape, it is
        everybody's turn at once. Returns when all have moved. `threshold` overrides the settings' own.
        `urgent`: loading does not stand back behind serving. On an error the running plan stays as it was.
        Raises CheckpointError, UnknownDepthError, OutOfMemoryError, InvalidRequestError.
        """
        with self._reload_lock:
            plan = load_plan(Path(path), depth, self.settings, progress, threshold, self.plan, urgent=urgent)
            if plan.tokenizer_id != self.plan.tokenizer_id:
                raise InvalidRequestError(
                    f"{plan.entry.name} has another tokenizer than {self.plan.entry.name}: sequences in "
                    "flight cannot move to it; start a worker for it instead"
                )
            swap, cache = Swap(plan, self.plan), self._cache
            with self._lock:
                if self._stopping:
                    raise UnavailableError("the engine is stopping")
                self._swap = swap
                self._call()
            while self._thread is None and not swap.done.is_set():
                self.step()
            swap.done.wait()
            # Here, where no stream waits for it.
            cache.give_back()
            if isinstance(swap.result, HeliosError):
                raise swap.result
            return swap.result

    def _apply(self, swap: Swap) -> None:
        began = time.monotonic()
        scheduler, old, new = self._scheduler, swap.before, swap.plan
        swap.moved = len(scheduler.running)
        try:
            if new.checkpoint_id == old.checkpoint_id and new.depth <= old.depth:
                # What the lower layers have cached stays valid; only the upper layers' KV goes.
                scheduler.chunks = self._chunk_budget(new, scheduler.chunks)
                self.plan, self._graphs = new, None
                self._settle()
                swap.stall_seconds = time.monotonic() - began
                swap.end()
                return
            swap.waiting = {seq: self._last_step for seq in scheduler.running if seq.is_decoding}
            if self._can_move_to(new):
                self._begin_move(swap)
            else:
                self._replace(new)
            self._moving = swap
        except HeliosError as error:
            swap.result = error
        finally:
            # Whoever waits for the reload hears of its end even if it takes the loop down.
            if self._moving is not swap:
                swap.done.set()

    def _can_move_to(self, new: Plan) -> bool:
        """Whether keys and values of both plans can lie in the blocks that there are."""
        config, cache = new.model.config, self._cache
        return cache.device.type == "cpu" and cache.has_room_for(
            new.memory.num_blocks, config.num_heads, config.head_dim, new.model.kv_dtype
        )

    def _begin_move(self, swap: Swap) -> None:
        """Takes in new sequences under another plan, and has the running ones move to it bit by bit.

        Meanwhile there are as many layers as either plan has, and as many blocks as both have.
        """
        new, old, scheduler = swap.plan, swap.before, self._scheduler
        had = scheduler.pool.num_blocks
        num_blocks = min(new.memory.num_blocks, had)
        try:
            self._cache.resize(max(new.depth, old.depth), num_blocks)
        except (RuntimeError, MemoryError, OSError) as error:
            self._cache.resize(old.depth, had)
            raise _no_room(num_blocks, error) from error
        scheduler.outdate(num_blocks, self._chunk_budget(new, scheduler.chunks))
        self.plan = new
        for seq in list(scheduler):
            self._refuse_misfit(seq)

    def _has_moved(self, swap: Swap) -> bool:
        """Whether all that had begun to generate do so under the new plan, or wait for memory."""
        return not self._scheduler.moving and not any(
            seq.state is SequenceState.RUNNING for seq in swap.waiting
        )

    def _end_move(self, swap: Swap) -> None:
        self._moving = None
        self._settle()
        swap.end()

    def _settle(self) -> None:
        """Gives the plan in force, which is the only one, the layers and blocks that are its."""
        plan, cache, spare = self.plan, self._cache, self._spare_blocks(self.plan)
        cache.resize(plan.depth, plan.memory.num_blocks + spare)
        self._scheduler.pool.grow(cache.num_blocks - spare)
        self._scheduler.chunks.settle()
        self._graphs = self._graphs or self._graphs_of(plan, cache)

    def _replace(self, new: Plan) -> None:
        """Makes the pool anew for another plan, under which all running sequences are recomputed."""
        old, cache = self._scheduler, self._cache
        moved_until = old.preempt_all()
        # On a GPU the old pool goes before the new one comes: both together would break the budget.
        self._graphs = None
        cache.resize(0, 0)
        try:
            self._scheduler, self._cache, self._graphs = self._allocate(new, cache)
            self.plan = new
        except OutOfMemoryError:
            self._scheduler, self._cache, self._graphs = self._allocate(self.plan, cache)
            raise
        finally:
            self._scheduler.moved_until = max(moved_until, old.moved_until)
            self._scheduler.preemptions = old.preemptions
            self._scheduler.cached_tokens = old.cached_tokens
            for seq in old.waiting:
                self._admit(seq)

    def _admit(self, seq: Sequence) -> None:
        """Queues a sequence; one that the plan in force cannot hold is handed back to its owner."""
        self._scheduler.add(seq)
        self._refuse_misfit(seq)

    def _refuse_misfit(self, seq: Sequence) -> None:
        needed = seq.prompt_tokens + seq.sampling.max_tokens
        # The pool holds at least one full context (memory.plan_memory).
        if needed > self.plan.model.config.context_tokens:
            message = f"{self.plan.entry.name} at depth {self.plan.depth} cannot hold {needed} tokens"
            self._end(seq, Output(error=UnavailableError(message + "; another worker may")))

    def telemetry(self) -> Telemetry:
        """The engine's load now."""
        with self._lock:
            submitted = len(self._submitted)
        scheduler = self._scheduler
        return Telemetry(
            model=self.plan.entry.name,
            depth=self.plan.depth,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + submitted,
            blocks_total=scheduler.pool.num_blocks,
            blocks_free=scheduler.pool.free_blocks,
            counters=self._counters,
            preemptions=scheduler.preemptions,
            cached_tokens=scheduler.cached_tokens,
            step_age=time.monotonic() - self._last_step,
        )

    def _allocate(
        self, plan: Plan, before: KVCache | None = None
    ) -> tuple[Scheduler, KVCache, DecodeGraphs | None]:
        """What runs a plan; with the cache of the plan before, if that one has room."""
        settings = self.settings
        pool = BlockPool(plan.memory.num_blocks, settings.block_tokens)
        cache = self._allocate_cache(plan, before)
        chunks = self._chunk_budget(plan, None if before is None else self._scheduler.chunks)
        # In exit mode dynamic the KV of generated tokens is an estimate, which a prompt's is not.
        shares = settings.prefix_cache and settings.exit_mode is not ExitMode.DYNAMIC
        scheduler = Scheduler(
            pool,
            settings.max_running,
            settings.step_token_budget,
            chunks,
            copy_block=cache.copy if shares else None,
        )
        return scheduler, cache, self._graphs_of(plan, cache)

    def _chunk_budget(self, plan: Plan, before: ChunkBudget | None) -> ChunkBudget:
        """Of a plan, with what its steps are expected to take by what those of the plan in force do."""
        settings = self.settings
        chunks = ChunkBudget(settings.prefill_stretch, settings.block_tokens, settings.step_token_budget)
        if before is not None:
            steps = [one.model.config.step_parameters(one.depth) for one in (plan, self.plan)]
            chunks.expect(before, steps[0] / steps[1])
        return chunks

    def _allocate_cache(self, plan: Plan, before: KVCache | None) -> KVCache:
        settings, config, memory = self.settings, plan.model.config, plan.memory
        num_blocks, kept = memory.num_blocks + self._spare_blocks(plan), plan.model.kv_dtype
        heads, head_dim = config.num_heads, config.head_dim
        try:
            if before is not None and before.has_room_for(num_blocks, heads, head_dim, kept):
                before.resize(plan.depth, num_blocks)
                return before
            return KVCache(
                plan.depth,
                num_blocks,
                settings.block_tokens,
                heads,
                head_dim,
                kept,
                plan.model.device,
                most_blocks=memory.most_blocks,
                # During a reload streams wait.
                commit=before is None,
            )
        except (RuntimeError, MemoryError, OSError) as error:
            raise _no_room(num_blocks, error) from error

    def _spare_blocks(self, plan: Plan) -> int:
        """One for the padding of graphs, where there are graphs."""
        return int(self.settings.cuda_graphs and plan.model.device.type == "cuda")

    def _graphs_of(self, plan: Plan, cache: KVCache) -> DecodeGraphs | None:
        """Graphs for the decode steps of a plan, where its device has them."""
        if not self._spare_blocks(plan):
            return None
        return DecodeGraphs(plan.model, cache, cache.num_blocks - 1, self.settings.max_running)

    def _check(self, prompt_ids: list[int], emitted: list[int], sampling: SamplingParams) -> SamplingParams:
        """The sampling with max_tokens cut to what the context leaves, or InvalidRequestError."""
        config = self.plan.model.config
        if not prompt_ids:
            raise InvalidRequestError("the prompt is empty; send at least one token")
        try:
            array("q", (*prompt_ids, *emitted))
        except (TypeError, OverflowError) as error:
            raise InvalidRequestError(f"token ids must be whole numbers: {error}") from None
        for token_id in (*prompt_ids, *emitted):
            if not 0 <= token_id < config.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {config.vocab_size}"
                )
        room = config.context_tokens - len(prompt_ids)
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_ids)} tokens; {self.plan.entry.name} knows "
                f"{config.context_tokens} positions, and at least one must be left for the output"
            )
        max_tokens = min(sampling.max_tokens, room)
        if len(emitted) > max_tokens:
            raise InvalidRequestError(f"{len(emitted)} tokens are emitted, more than max_tokens {max_tokens}")
        return sampling.capped(max_tokens)


def _failure(seq: Sequence, error: Exception) -> HeliosError:
    """What a sequence ends with that has failed by itself; the log gets the cause."""
    log.error("sequence %s failed", seq.request_id, exc_info=error)
    if isinstance(error, HeliosError):
        return error
    return SequenceFailedError(
        f"the sequence failed: {type(error).__name__}: {error}; the worker's log has the cause"
    )


def _no_room(num_blocks: int, error: BaseException) -> OutOfMemoryError:
    return OutOfMemoryError(f"no memory for {num_blocks} blocks of KV: {error}")
