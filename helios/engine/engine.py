"""The engine: submit, cancel, reload and telemetry, around one loop of schedule, run, deliver."""

import logging
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch

from helios.engine.backends.burst import ONE_STEP, Burst, Interrupt
from helios.engine.backends.sampler import Row, sample
from helios.engine.delivery import Delivery, failure, take
from helios.engine.interface import (
    GeneratedToken,
    Limits,
    Output,
    PlanToLoad,
    Progress,
    Reloaded,
    Route,
    Served,
    ServedPrompt,
    Sink,
    Telemetry,
)
from helios.engine.memory import device_budget
from helios.engine.move import Reload, ServedPlans
from helios.engine.plan import Plan, bytes_read_for, load_plans
from helios.engine.probe import Prober
from helios.engine.scheduling.batch import Batch, build_batch
from helios.engine.scheduling.detokenizer import Detokenizer, token_texts
from helios.engine.scheduling.prompt_readings import PromptReadings
from helios.engine.scheduling.sequence import Sequence
from helios.engine.settings import EngineSettings
from helios.errors import (
    CancelledError,
    DeadlineExceededError,
    EngineFailedError,
    HeliosError,
    InvalidRequestError,
    OverloadedError,
    SettingsError,
    UnavailableError,
)
from helios.sampling import SamplingParams
from helios.served import ServedPlan

log = logging.getLogger(__name__)

# How long an idle loop sleeps at most, seconds.
_IDLE_SECONDS = 0.1


class Engine:
    """Serves sequences in this process. It implements `ServingEngine`.

    Either one thread calls `step` (as `generate` does), or `start` runs the loop in its own thread. Any
    thread may call the other methods.
    """

    def __init__(self, plan: Plan, settings: EngineSettings, also: Seq[Plan] = ()) -> None:
        """Allocates the KV cache. Raises OutOfMemoryError.

        plan, also: the first plan in force and the others, loaded together (`load_plans`).
        """
        self.settings = settings
        # The inbox: requests of other threads, to be handled before the next step.
        self._lock = threading.Condition()
        self._submitted: deque[Sequence] = deque()
        self._cancelled: dict[str, HeliosError] = {}
        self._reload: Reload | None = None
        self._stopping = False
        self._interrupt = Interrupt()
        self._sequences: dict[str, Sequence] = {}

        self._plans = ServedPlans((plan, *also), settings)
        self._scheduler = self._plans.scheduler
        self._delivery = Delivery(self._scheduler, self._forget)
        self._prober = Prober(settings)
        # All plans have the same tokenizer.
        self._token_texts = token_texts(plan.tokenizer)
        self._thread: threading.Thread | None = None
        self._last_step = time.monotonic()
        self._reload_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        depth: int | None = None,
        settings: EngineSettings | None = None,
        threshold: float | None = None,
        *,
        also: Seq[PlanToLoad] = (),
    ) -> Self:
        """Loads the first `depth` layers (None: all) of the checkpoint directory `path`, and other plans.

        `threshold` overrides the one of the settings until a reload. also: as in `reload`.
        Raises CheckpointError, UnknownDepthError, OutOfMemoryError, SettingsError, InvalidRequestError.
        """
        settings = settings or EngineSettings()
        if settings.memory_bytes is None:
            settings = replace(settings, memory_bytes=device_budget(torch.device(settings.device)))
        first, *others = load_plans([PlanToLoad(Path(path), depth, threshold), *also], settings)
        return cls(first, settings, others)

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
        plan: ServedPlan | None = None,
        route: Route | None = None,
    ) -> Sequence:
        """Queues a sequence, as `ServingEngine.submit` says."""
        emitted, chosen = emitted_ids or [], self.plan if plan is None else self._plans.of(plan)
        sampling = _checked(chosen, prompt_ids, emitted, sampling)
        sequence = Sequence(
            request_id=request_id,
            token_ids=[*prompt_ids, *emitted],
            prompt_tokens=len(prompt_ids),
            sampling=sampling,
            detokenizer=Detokenizer(chosen.tokenizer, sampling.stop, self._token_texts),
            sink=sink,
            plan=chosen.served,
            deadline=None if deadline is None else float(deadline),
            route=None if emitted and plan is not None else route,
        )
        try:
            _, ended = take(sequence, emitted, 0, chosen.model.config.eos_token_ids)
        except Exception as error:
            raise failure(sequence, error) from None
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
        """Ends a sequence before the next step, as `ServingEngine.cancel` says."""
        with self._lock:
            if request_id in self._sequences:
                self._cancelled[request_id] = error or CancelledError("the request was cancelled")
                self._call()

    def generate(
        self, prompt: str | list[int], sampling: SamplingParams | None = None
    ) -> Iterator[GeneratedToken]:
        """Yields the tokens of one prompt. Steps the engine itself. Raises HeliosError."""
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

    # -- the loop ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Runs the loop in a thread until `stop`."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop. Sequences that have not ended get UnavailableError."""
        with self._lock:
            self._stopping = True
            self._call()
        if self._thread is not None:
            self._thread.join()

    @property
    def running(self) -> bool:
        """Whether the loop that `start` began is alive."""
        return self._thread is not None and self._thread.is_alive()

    @torch.inference_mode()
    def step(self) -> bool:
        """Schedules, runs and delivers one step. Returns False if there was nothing to do."""
        return self._step()

    def _step(self) -> bool:
        self._take_inbox()
        self._route()
        began = time.perf_counter()
        self._expire()
        scheduled = self._scheduler.schedule(self._plans.send_back())
        self._plans.end_move()
        if not scheduled:
            self._last_step = time.monotonic()
            return self._prober.is_waiting
        decoding = prompt_tokens = most_steps = 0
        # Seconds of one step, if a burst took several.
        seconds = 0.0
        parts, steps = self._plans.grouped(scheduled), 1
        if (
            self._plans.move is None
            and not self._prober.is_waiting
            and all(plan.runner.has_bursts for plan, _ in parts)
        ):
            steps = self._burst_steps(scheduled)
        chunks = self._scheduler.chunks
        cost = chunks.cost([seq for seq, _ in scheduled if seq.is_decoding])
        for plan, part in parts:
            batch, taken = self._run(plan, part, steps)
            decoding += batch.decode_rows
            prompt_tokens += sum(tokens for _, tokens in part) - batch.decode_rows
            most_steps, now = max(most_steps, taken), time.perf_counter()
            seconds, began = seconds + (now - began) / taken, now
        self._delivery.counters.steps += most_steps
        self._delivery.counters.prefill_tokens += prompt_tokens
        # A step during a move says little about the plans in force. It is observed only while no step time is
        # known, because prompts wait for one.
        if self._plans.move is None or chunks.decode_seconds(decoding) is None:
            chunks.observe(decoding, prompt_tokens, seconds, cost)
        self._last_step = time.monotonic()
        return True

    def _run(self, plan: Plan, scheduled: list[tuple[Sequence, int]], steps: int) -> tuple[Batch, int]:
        """Runs and delivers what one call computes. Returns the batch and the number of steps taken.

        plan: one of the plans of the scheduled sequences. steps: the most steps to take.
        """
        plans, runner, in_force = self._plans, plan.runner, self._plans.is_in_force(plan)
        readings = PromptReadings(self.settings.prompt_readings if in_force else 0)
        burst = ONE_STEP
        scheduled = self._prober.go_on(plan, scheduled, plans.cache, self._scheduler.advance)
        batch, readers = build_batch(scheduled, self.settings.block_tokens, plan.model.device, readings)
        if runner.has_bursts:
            ends = plan.model.config.eos_token_ids
            burst = Burst.of(steps, readers, ends, self._interrupt, len(readings.rows))
        found, exits = runner.run(batch, plans.cache, burst)
        if readings.rows:
            self._delivery.note_readings(readings, found.rows(slice(len(readers), None)))
            found, exits = found.rows(slice(len(readers))), exits[: len(readers)]
        for seq, tokens in scheduled:
            self._scheduler.advance(seq, tokens)
        if readers:
            rows: dict[int, Row] = {}
            if not runner.has_bursts:
                rows = {i: Row.of(seq) for i, seq in enumerate(readers) if not seq.takes_likeliest}
            if plans.move is not None:
                plans.move.note_tokens(readers)
            self._delivery.deliver(plan, readers, sample(found, rows), exits, in_force=in_force)
            # A burst may have ended early.
            steps = len(exits) // len(readers)
        return batch, steps

    def _burst_steps(self, scheduled: list[tuple[Sequence, int]]) -> int:
        """How many steps to take at once. Allocates the blocks that these steps need.

        Several models take as many steps each, one model after the other. The time of a step is that of all
        models, so together they take no longer than one model alone would, and every stream gets equally many
        tokens.
        """
        if not self.settings.burst_seconds:
            return 1
        left = scheduled[0][0].sampling.max_tokens
        for seq, _ in scheduled:
            if not seq.is_decoding:
                return 1
            left = min(left, seq.sampling.max_tokens - seq.completion_tokens)
        chunks = self._scheduler.chunks
        seconds = chunks.decode_seconds(len(scheduled), chunks.cost([seq for seq, _ in scheduled]))
        if seconds is None:
            return 1
        count = max(1, min(left, int(self.settings.burst_seconds / seconds)))
        sequences = (seq for seq, _ in scheduled)
        return count if count == 1 or self._scheduler.reserve(sequences, count - 1) else 1

    def _loop(self) -> None:
        try:
            # Entered once for all steps, because entering it takes as long as scheduling a small batch.
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
        """Sleeps until there is work, but only briefly, so that telemetry shows that the loop is alive."""
        with self._lock:
            if not (self._submitted or self._cancelled or self._reload or self._stopping):
                self._lock.wait(timeout=_IDLE_SECONDS)

    def _call(self) -> None:
        """Makes the loop look into the inbox soon. The caller holds the lock."""
        self._interrupt.ask()
        self._lock.notify_all()

    def _take_inbox(self) -> None:
        """Handles the requests of other threads, between two steps."""
        with self._lock:
            self._interrupt.clear()
            submitted, self._submitted = self._submitted, deque()
            cancelled, self._cancelled = self._cancelled, {}
            reload, self._reload = self._reload, None
        for sequence in submitted:
            # A reload may have happened since it was submitted.
            sequence.change_plan(self._plans.plan_for(sequence).served)
            self._scheduler.add(sequence)
            if sequence.route is not None:
                self._prober.add(sequence)
            else:
                self._refuse_misfit(sequence)
        for request_id, error in cancelled.items():
            if (found := self._sequences.get(request_id)) is not None:
                self._delivery.end(found, Output(error=error))
        if reload is not None:
            self._plans.take_over(reload, self._last_step)
            for sequence in list(self._scheduler):
                self._refuse_misfit(sequence)

    def _route(self) -> None:
        """Gives plans to the next sequences that wait for one. Those that get none end."""
        if not self._prober.is_waiting:
            return
        plans = self._plans.in_force
        models = list({id(plan.model): plan for plan in plans}.values())
        for seq, error in self._prober.route(models, {plan.served for plan in plans}):
            if error is None:
                self._refuse_misfit(seq)
            else:
                known = error if isinstance(error, HeliosError) else failure(seq, error)
                self._delivery.end(seq, Output(error=known))

    def _expire(self) -> None:
        now = time.monotonic()
        late = [seq for seq in self._scheduler if seq.deadline is not None and seq.deadline <= now]
        for seq in late:
            error = DeadlineExceededError(
                f"the deadline passed after {seq.completion_tokens} of {seq.sampling.max_tokens} tokens"
            )
            self._delivery.end(seq, Output(error=error))

    def _refuse_misfit(self, seq: Sequence) -> None:
        """Ends a sequence that is too long for its plan, or for the one to which it moves."""
        needed, plan = seq.prompt_tokens + seq.sampling.max_tokens, self._plans.plan_for(seq)
        # The pool holds at least one full context at each depth (memory.plan_memory).
        if needed > plan.model.config.context_tokens:
            message = f"{plan.served} cannot hold {needed} tokens; another worker may"
            self._delivery.end(seq, Output(error=UnavailableError(message)))

    def _forget(self, seq: Sequence) -> None:
        with self._lock:
            del self._sequences[seq.request_id]

    def _fail_all(self, error: HeliosError) -> None:
        with self._lock:
            self._stopping = True
            reload, self._reload = self._reload, None
        if reload is not None:
            reload.done.set()
        self._plans.abandon_move()
        self._take_inbox()
        for seq in list(self._scheduler):
            self._delivery.end(seq, Output(error=error))

    # -- the plans --------------------------------------------------------------------------------

    def reload(
        self,
        path: str | Path,
        depth: int | None = None,
        progress: Progress | None = None,
        threshold: float | None = None,
        *,
        also: Seq[PlanToLoad] = (),
        urgent: bool = False,
    ) -> Reloaded:
        """Loads plans while the running ones serve, and puts them in force between two steps (`move.py`).

        Weights that a running plan has are shared: a deeper plan loads only the missing layers. Everything
        else is as `ServingEngine.reload` says.
        Raises CheckpointError, UnknownDepthError, OutOfMemoryError, InvalidRequestError, SettingsError,
        UnavailableError.
        """
        with self._reload_lock:
            wanted = [PlanToLoad(Path(path), depth, threshold), *also]
            plans = load_plans(wanted, self.settings, progress, self._plans.in_force, urgent=urgent)
            plan = plans[0]
            if plan.tokenizer_id != self.plan.tokenizer_id:
                raise InvalidRequestError(
                    f"{plan.entry.name} has another tokenizer than {self.plan.entry.name}: sequences in "
                    "flight cannot move to it; start a worker for it instead"
                )
            reload, cache = Reload(plans), self._plans.cache
            with self._lock:
                if self._stopping:
                    raise UnavailableError("the engine is stopping")
                self._reload = reload
                self._call()
            while self._thread is None and not reload.done.is_set():
                self.step()
            reload.done.wait()
            # Done in this thread, because no stream waits for it.
            cache.give_back()
            if isinstance(reload.result, HeliosError):
                raise reload.result
            return reload.result

    @property
    def plan(self) -> Plan:
        """The first plan in force, which new sequences get unless they name another."""
        return self._plans.in_force[0]

    @property
    def served(self) -> Served:
        """The plans in force, and facts about the first one's model."""
        plans = self._plans.in_force
        plan, config = plans[0], plans[0].model.config
        return Served(
            plan=plan.served,
            plans=tuple(one.served for one in plans),
            num_layers=config.num_layers,
            exit_layers=plan.entry.exit_layers,
            vocab_size=config.vocab_size,
            context_tokens=config.context_tokens,
            tokenizer_id=plan.tokenizer_id,
            tokenizer_json=plan.tokenizer_json,
            chat_templates={
                one.served.model: one.chat_template for one in plans if one.chat_template is not None
            },
            threshold=plan.thresholds.get(plan.depth),
            precision=plan.model.precision,
            weight_bytes=plan.memory.weight_bytes,
            kv_bytes_per_token=plan.memory.kv_bytes_per_token,
            memory_bytes=(self.settings.memory_bytes or 0) - plan.memory.activation_bytes,
            bytes_read=bytes_read_for(plans),
        )

    @property
    def limits(self) -> Limits:
        """The limits from the settings."""
        settings = self.settings
        return Limits(
            exit_mode=settings.exit_mode,
            device=settings.device,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            step_token_budget=settings.step_token_budget,
            block_tokens=settings.block_tokens,
        )

    def telemetry(self) -> Telemetry:
        """The engine's current load."""
        with self._lock:
            submitted = len(self._submitted)
        scheduler, plans = self._scheduler, [plan.served for plan in self._plans.in_force]
        under = Counter(seq.plan for seq in scheduler.running.copy())
        return Telemetry(
            plan=plans[0],
            plans={plan: under[plan] for plan in plans},
            running=under.total(),
            waiting=len(scheduler.waiting) + submitted,
            blocks_total=scheduler.pool.num_blocks,
            blocks_free=scheduler.pool.free_blocks,
            counters=self._delivery.counters,
            preemptions=scheduler.preemptions,
            cached_tokens=scheduler.cached_tokens,
            step_age=time.monotonic() - self._last_step,
        )

    def served_prompts(self, after: int) -> list[ServedPrompt]:
        """Probed prompts, as `ServingEngine.served_prompts` says."""
        return [one for one in self._delivery.served_prompts.copy() if one.number > after]


def _checked(
    plan: Plan, prompt_ids: list[int], emitted: list[int], sampling: SamplingParams
) -> SamplingParams:
    """Returns the sampling with max_tokens cut to the room in the context. Raises InvalidRequestError."""
    config = plan.model.config
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty; send at least one token")
    try:
        array("q", (*prompt_ids, *emitted))
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"token ids must be whole numbers: {error}") from None
    for token_id in (*prompt_ids, *emitted):
        if not 0 <= token_id < config.vocab_size:
            raise InvalidRequestError(f"token id {token_id} is outside the vocabulary of {config.vocab_size}")
    room = config.context_tokens - len(prompt_ids)
    if room < 1:
        raise InvalidRequestError(
            f"the prompt has {len(prompt_ids)} tokens; {plan.entry.name} is served with "
            f"a context of {config.context_tokens}, and at least one must be left for the output"
        )
    max_tokens = min(sampling.max_tokens, room)
    if len(emitted) > max_tokens:
        raise InvalidRequestError(f"{len(emitted)} tokens are emitted, more than max_tokens {max_tokens}")
    return sampling.capped(max_tokens)
