"""ProfilerService: evaluates candidates one after the other, and stores the results in Redis."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import grpc
from opentelemetry.trace import SpanKind, StatusCode
from redis.asyncio import Redis
from redis.exceptions import RedisError
from tokenizers import Tokenizer

from helios import catalog, examples, history, telemetry
from helios.drift import pooled
from helios.engine.evaluation.candidate import Candidate
from helios.engine.evaluation.evaluate import Progress, evaluate
from helios.engine.evaluation.pace import Pace
from helios.engine.evaluation.router_examples import evaluate_for_router
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.threads import set_threads
from helios.errors import (
    CheckpointError,
    HeliosError,
    InvalidRequestError,
    OutOfMemoryError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from helios.history import ModelProfile
from helios.ignored_entries import IgnoredEntries
from helios.redis_outage import reason
from helios.redis_schema import PROFILE_PREFIX
from helios.routing.example import ModelExample
from helios.server import abort
from helios.shortlist import shortlist
from helios.v1 import profiler_pb2, profiler_pb2_grpc
from services.profiler.candidates import Candidates
from services.profiler.prompt_set import PromptSet, Tokenizers, choose
from services.profiler.settings import ProfilerSettings

log = logging.getLogger(__name__)

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

# With these errors one candidate fails, but the others continue.
_CandidateErrors = (CheckpointError, OutOfMemoryError, InvalidRequestError)
# How long to wait for recent enough prompts, and the interval between two checks.
_YOUNG_PROMPTS_SECONDS, _LOOK_SECONDS = 1.0, 0.05
# Retry hint until the first evaluation has ended.
_FIRST_RETRY_SECONDS = 5.0


_Result = TypeVar("_Result")
# The arguments are a candidate, whether it was loaded for this call, the prompts' ids, progress and pace.
_Work: TypeAlias = Callable[[Candidate, bool, list[list[int]], Progress, Pace], _Result]


@dataclass(frozen=True, slots=True)
class _Call:
    """An Evaluate call, and the prompts that were chosen for it."""

    request: profiler_pb2.EvaluateRequest
    context: _Context
    prompts: PromptSet
    # Tokenizers of recent prompts, by id.
    known: Mapping[str, Tokenizer]


class ProfilerService(profiler_pb2_grpc.ProfilerServiceServicer):
    """Runs one evaluation at a time in its own thread. Without `redis` no result is stored."""

    def __init__(self, settings: ProfilerSettings, models_dir: Path, redis: Redis | None) -> None:
        self._settings = settings
        self._models_dir = models_dir
        self._redis = redis
        self._evaluation = EvaluationSettings(
            target_agreement=settings.target_agreement,
            threshold=settings.threshold,
            max_prompt_tokens=settings.max_prompt_tokens,
            generated_tokens=settings.generated_tokens,
            batches=settings.batches,
            repetitions=settings.repetitions,
            probe_tokens=settings.probe_tokens,
            probe_readings=settings.probe_readings,
            router_stride=settings.router_stride,
            device=settings.device,
            precision=settings.precision,
            memory_bytes=settings.memory_bytes,
            power_watts=settings.power_watts,
            timing_threads=settings.timing_threads,
            packed_cache_dir=settings.packed_cache_dir,
            packed_cache_bytes=settings.packed_cache_bytes,
        )
        # One thread has a lower priority than serving, the other is for urgent work. Only one works at a
        # time.
        self._thread, self._urgent_thread = (
            ThreadPoolExecutor(1, initializer=_begin_thread, initargs=(settings, niceness))
            for niceness in (settings.niceness, 0)
        )
        self._tokenizers = Tokenizers()
        # Computed from the memory that is free now. Later, models that stay loaded would count as used.
        self._budget = self._evaluation.budget
        self._candidates = Candidates(self._evaluation, self._budget)
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._last_seconds = _FIRST_RETRY_SECONDS
        # The last profile of each model, used when Redis cannot be reached.
        self._last: dict[str, ModelProfile] = {}
        self._ignored = IgnoredEntries(log)

    def close(self) -> None:
        """Waits until the threads end. Cancel their evaluation first."""
        self._thread.shutdown()
        self._urgent_thread.shutdown()

    async def Evaluate(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes as well
        self, request: profiler_pb2.EvaluateRequest, context: _Context
    ) -> None:
        """Evaluates the named models, or the shortlist. Results are sent and stored one by one.

        With `for_router` the results are examples for routers, and profiles do not change.

        A model that cannot be evaluated does not stop the others. The call ends with its status after all
        have had their turn. UNAVAILABLE after results means that they could not be stored. RESOURCE_EXHAUSTED
        means that too many evaluations wait.
        """
        parent = telemetry.extract(context.invocation_metadata())
        with telemetry.span("Evaluate", parent, SpanKind.SERVER) as span:
            failure = await self._evaluate_in_turn(request, context)
            if failure is not None:
                span.set_status(StatusCode.ERROR, failure.message)
                log.warning("evaluation failed: %s", failure.message)
        if failure is not None:
            await abort(context, failure)

    async def GetHistory(
        self, request: profiler_pb2.GetHistoryRequest, context: _Context
    ) -> profiler_pb2.GetHistoryResponse:
        """The profiles in Redis of models in the models directory. Others are ignored and logged."""
        try:
            profiles = await self._history()
        except HeliosError as error:
            await abort(context, error)
        wanted = set(request.models) or set(profiles)
        return profiler_pb2.GetHistoryResponse(
            profiles=[profile.to_proto() for name, profile in profiles.items() if name in wanted]
        )

    async def _history(self) -> dict[str, ModelProfile]:
        if self._redis is None:
            raise UnavailableError("without a Redis there is no history; start the profiler with --redis-url")
        try:
            profiles, ignored = await history.read(self._redis)
        except (RedisError, OSError) as error:
            raise UnavailableError(f"the history cannot be read from Redis: {reason(error)}") from error
        known = {entry.name for entry in catalog.list_models(self._models_dir)}
        ignored |= {PROFILE_PREFIX + name: "the model is gone" for name in profiles if name not in known}
        self._ignored.update(ignored)
        return {name: profile for name, profile in profiles.items() if name in known}

    def _shortlist(self) -> list[str]:
        """Names of the models that are worth profiling. Raises UnknownModelError when there are none."""
        found = catalog.read_catalog(self._models_dir)
        for model in found.broken:
            log.warning("%s cannot be evaluated: %s", model.name, model.reason)
        chosen = shortlist(
            [entry.within(self._settings.context_tokens) for entry in found.models],
            self._settings.objective,
            self._budget,
            self._evaluation.precision_here,
            self._settings.top_k,
        )
        for name, why in chosen.refused.items():
            log.info("not on the shortlist: %s: %s", name, why)
        if not chosen.candidates:
            reasons = [f"{model.name}: {model.reason}" for model in found.broken]
            reasons += [f"{name}: {why}" for name, why in chosen.refused.items()]
            raise UnknownModelError(
                f"no model to evaluate in {self._models_dir} ({'; '.join(reasons) or 'it is empty'}); "
                "fetch one with `helios models pull`"
            )
        return [entry.name for entry in chosen.candidates]

    def _check_known(self, name: str) -> None:
        try:
            catalog.find_model(self._models_dir, name)
        except CheckpointError:
            # The model exists. What is wrong with it is reported when its turn comes.
            return

    @asynccontextmanager
    async def _take_turn(self) -> AsyncIterator[None]:
        """Waits until no other evaluation runs. Raises OverloadedError when too many already wait."""
        if self._turn.locked() and self._waiting >= self._settings.max_waiting:
            raise OverloadedError(
                f"an evaluation runs and {self._waiting} wait; come back later", self._last_seconds
            )
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._last_seconds = time.monotonic() - began
            self._turn.release()

    async def _evaluate_in_turn(
        self, request: profiler_pb2.EvaluateRequest, context: _Context
    ) -> HeliosError | None:
        """Returns the error with which to end the call, if any."""
        try:
            if request.HasField("requests") and not request.requests:
                raise InvalidRequestError("requests must be at least 1; leave it unset for the default")
            names = list(dict.fromkeys(request.models)) or self._shortlist()
            for name in names:
                self._check_known(name)
            async with self._take_turn():
                failures = await self._evaluate_all(names, request, context)
        except HeliosError as error:
            return error
        return _joined(failures) if failures else None

    async def _evaluate_all(
        self, names: Sequence[str], request: profiler_pb2.EvaluateRequest, context: _Context
    ) -> list[HeliosError]:
        loop = asyncio.get_running_loop()
        thread = self._urgent_thread if request.fresh else self._thread
        known = await loop.run_in_executor(thread, self._known_tokenizers)
        settings = self._settings
        count = request.requests or settings.requests
        newest_seconds = request.newest_seconds if request.HasField("newest_seconds") else None
        began = time.monotonic()
        prompts = await choose(self._redis, known, count, settings.min_tokens, newest_seconds)
        # The traffic has just begun, so more prompts will come soon.
        while newest_seconds is not None and len(prompts.prompts) < count:
            await asyncio.sleep(_LOOK_SECONDS)
            waited = time.monotonic() - began
            prompts = await choose(self._redis, known, count, settings.min_tokens, newest_seconds + waited)
            if waited > _YOUNG_PROMPTS_SECONDS:
                break
        if not prompts.prompts:
            raise InvalidRequestError(f"no prompt was sampled in the last {newest_seconds:.1f} s; try again")
        call = _Call(request, context, prompts, known)
        failures: list[HeliosError] = []
        for name in names:
            try:
                if request.for_router:
                    await self._add_examples(name, call)
                else:
                    await self._add_profile(name, call)
            except (*_CandidateErrors, UnavailableError) as error:
                failures.append(error)
        return failures

    async def _add_profile(self, name: str, call: _Call) -> None:
        """Evaluates one candidate, sends its profile and stores it.

        Raises UnavailableError if Redis did not take it, and the errors of the evaluation.
        """
        prompts, request = call.prompts, call.request
        before = await self._before(name)

        def profiled(
            candidate: Candidate, is_fresh: bool, ids: list[list[int]], progress: Progress, pace: Pace
        ) -> ModelProfile:
            timed = None if request.remeasure else before
            settings = self._evaluation
            if request.prompts_only:
                settings = replace(settings, generated_tokens=1)
            profile = evaluate(candidate, ids, settings, progress, pace, timed, prompts.names)
            provenance = {**profile.provenance, "prompts": prompts.source}
            update: dict[str, object] = {"provenance": provenance}
            if is_fresh:
                update["wall_seconds"] = profile.wall_seconds + candidate.load_seconds
                update["cpu_seconds"] = profile.cpu_seconds + candidate.load_cpu_seconds
                update["once_cpu_seconds"] = profile.once_cpu_seconds + candidate.load_cpu_seconds
            return profile.model_copy(update=update)

        profile = await self._evaluate(name, call, profiled)
        # Requests are pooled only if they belong to the same traffic and were read by the same weights.
        if before is not None and _is_poolable(before, profile):
            settings = self._settings
            target = settings.target_agreement if settings.threshold is None else None
            keep = settings.pooled_requests
            if request.fresh:
                keep = min(keep, settings.fresh_pooled_requests)
            profile = pooled(before, profile, keep, target, is_noticed=request.fresh)
        self._last[name] = profile
        await call.context.write(profiler_pb2.EvaluateResponse(result=profile.to_proto()))
        log.info(
            "evaluated %s on %d %s requests (%d pooled) in %.2f s (%.2f s of CPU, %.2f s of it once)",
            name,
            len(prompts.prompts),
            prompts.source,
            profile.requests,
            profile.wall_seconds,
            profile.cpu_seconds,
            profile.once_cpu_seconds,
        )
        if self._redis is None:
            return
        try:
            await history.write(self._redis, profile)
        except (RedisError, OSError) as error:
            raise UnavailableError(f"{name} was evaluated but not stored: {reason(error)}") from error

    async def _add_examples(self, name: str, call: _Call) -> None:
        """Evaluates one candidate for routers, sends what it cost and stores the examples.

        Raises the same errors as `_add_profile`.
        """
        prompts = call.prompts
        settings = replace(self._evaluation, generated_tokens=1)

        def evaluated(
            candidate: Candidate, is_fresh: bool, ids: list[list[int]], progress: Progress, pace: Pace
        ) -> tuple[list[ModelExample], profiler_pb2.RouterEvaluation]:
            began = time.process_time()
            found = evaluate_for_router(candidate, ids, prompts.names, settings, progress, pace)
            seconds = time.process_time() - began
            once = candidate.load_cpu_seconds if is_fresh else 0.0
            return found, profiler_pb2.RouterEvaluation(
                model=name, examples=len(found), cpu_seconds=seconds + once, once_cpu_seconds=once
            )

        found, result = await self._evaluate(name, call, evaluated)
        # They are stored first, because who gets the result reads them.
        failure: Exception | None = None
        if self._redis is not None:
            try:
                await examples.append(self._redis, name, found, self._settings.examples_kept)
            except (RedisError, OSError) as error:
                failure = error
        await call.context.write(profiler_pb2.EvaluateResponse(router_result=result))
        log.info(
            "evaluated %s for routers on %d %s requests (%d examples, %.2f s of CPU, %.2f s of it once)",
            name,
            len(prompts.prompts),
            prompts.source,
            result.examples,
            result.cpu_seconds,
            result.once_cpu_seconds,
        )
        if failure is not None:
            raise UnavailableError(f"{name} was evaluated but not stored: {reason(failure)}") from failure

    async def _evaluate(self, name: str, call: _Call, work: _Work[_Result]) -> _Result:
        """Has the thread work on one candidate, and sends its progress. Ends when the call is cancelled."""
        entry = catalog.find_model(self._models_dir, name).within(self._settings.context_tokens)
        loop = asyncio.get_running_loop()
        stages: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        pace = Pace(1.0 if call.request.fresh else self._settings.cpu_share)

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(stages.put_nowait, (done, total))

        def run() -> _Result:
            ids = call.prompts.ids_for(entry, call.known, self._tokenizers.of(entry))
            candidate, is_fresh = self._candidates.take(entry, ids)
            return work(candidate, is_fresh, ids, progress, pace)

        thread = self._urgent_thread if call.request.fresh else self._thread
        task = loop.run_in_executor(thread, run)
        task.add_done_callback(lambda _: stages.put_nowait(None))
        try:
            while (stage := await stages.get()) is not None:
                message = profiler_pb2.EvaluationProgress(
                    model=name, requests_done=stage[0], requests_total=stage[1]
                )
                await call.context.write(profiler_pb2.EvaluateResponse(progress=message))
            return await task
        finally:
            pace.stop()
            await asyncio.wait({task})

    async def _before(self, name: str) -> ModelProfile | None:
        """The model's last profile, from Redis or else from this process's memory."""
        if self._redis is None:
            return self._last.get(name)
        try:
            return await history.find(self._redis, name)
        except (RedisError, OSError) as error:
            log.warning("the last profile of %s cannot be read: %s", name, reason(error))
            return self._last.get(name)

    def _known_tokenizers(self) -> dict[str, Tokenizer]:
        """The tokenizers of the models directory, by id. Prompts of other tokenizers cannot be read."""
        found = {}
        for entry in catalog.list_models(self._models_dir):
            try:
                loaded = self._tokenizers.of(entry)
            except CheckpointError as error:
                log.warning("prompts of %s cannot be read: %s", entry.name, error)
            else:
                found[loaded.tokenizer_id] = loaded.tokenizer
        return found


def _begin_thread(settings: ProfilerSettings, niceness: int) -> None:
    """Sets up an evaluation thread. Each thread has its own torch thread count and, on Linux, niceness."""
    set_threads(settings.threads, settings.precision, settings.device)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + niceness)


def _is_poolable(before: ModelProfile, now: ModelProfile) -> bool:
    return all(
        before.provenance.get(name) == now.provenance[name] for name in ("prompts", "checkpoint", "precision")
    )


def _joined(failures: Sequence[HeliosError]) -> HeliosError:
    """One error for all failures. It has the status of the first."""
    if len(failures) == 1:
        return failures[0]
    return type(failures[0])("; ".join(error.message for error in failures))
