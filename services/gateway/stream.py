"""Relays one stream from a worker to the client, and from the next worker if that one is lost."""

import asyncio
import dataclasses
import logging
import math
from collections.abc import Awaitable, Callable

import grpc
from opentelemetry import trace

from helios.errors import (
    HeliosError,
    OverloadedError,
    QuarantinedError,
    SequenceFailedError,
    UnavailableError,
)
from helios.routing.preference import Preference
from helios.routing.ranked_plan import RankedPlan
from helios.sampling import SamplingParams
from helios.served import ServedPlan, successor
from helios.v1 import generation_pb2, worker_pb2
from services.gateway.outlet import Outlet
from services.gateway.router import Needs, Ranking
from services.gateway.settings import GatewaySettings
from services.gateway.worker_call import WorkerFailedError, WorkerLostError
from services.gateway.worker_pool import Worker, WorkerPool

log = logging.getLogger(__name__)

# Errors that the request itself causes. Another worker would return the same error.
_REQUEST_FAULTS = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION})


class _PlanChangedError(WorkerLostError):
    """The worker has changed its model since it was chosen, and has not begun the stream."""


class _WorkerFullError(Exception):
    """The worker has no free place for the stream."""

    def __init__(self, refusal: HeliosError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Stream:
    """A request that the gateway owns until it ends: its parameters, and the tokens emitted so far.

    A request may itself cause workers to fail, so its failures in a row are counted. When it has settled on a
    worker (`worker_call.py`), the count restarts. So a stream that only shared workers with the stream that
    killed them never reaches two failures. A stream continues at a worker without other suspects if it had
    not settled when its worker failed, or if two workers have failed under it. If that worker fails too, the
    stream ends, because nothing else there can have caused both failures. A stream that had settled continues
    at once, beside others. docs/decisions/0018 gives the reasons.

    A stream without tokens has its worker choose the plan. If that plan is in force elsewhere, the worker
    redirects the stream, which then names a plan. So it is redirected once, and again only after a loss.
    """

    def __init__(
        self,
        pool: WorkerPool,
        settings: GatewaySettings,
        *,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        preference: Preference,
        needs: Needs,
        dropped_messages: int,
        write: Callable[[bytes], Awaitable[None]],
        on_first_token: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._request_id = request_id
        self._prompt_ids = prompt_ids
        self._sampling = sampling
        self._preference = preference
        self._needs = needs
        self._dropped_messages = dropped_messages
        self._write = write
        self._outlet = Outlet(write)
        self._on_first_token = on_first_token
        self.emitted_ids: list[int] = []
        self.resumed = 0
        self.redirected = 0
        # Since the last token: number of lost workers, their addresses, and addresses of full workers.
        self._losses = 0
        self._failed: set[str] = set()
        self._full: set[str] = set()
        self._refusal: HeliosError | None = None
        self._refused_since: float | None = None
        # Number of workers that failed under it since it last settled on one, and whether it continues alone.
        self._failures = 0
        self._alone = False
        # Model and layers of the last token, and the plan at the lost worker. Only the same plan continues
        # with the same tokens.
        self.model = ""
        self._layers = 0
        self._plan: ServedPlan | None = None
        # The plans that may serve it, if a worker has redirected it.
        self._ranking: Ranking | None = None

    async def run(self, deadline: float) -> generation_pb2.Finish:
        """Relays until the finish is written, and returns it. `deadline` is in the event loop's time.

        Raises UnavailableError when no worker is available or too many are lost, QuarantinedError when the
        stream makes workers fail, OverloadedError when all are full, the worker's own error when the request
        is at fault, and TimeoutError when a worker notices first that the deadline has passed.
        """
        self._outlet.start()
        try:
            response = await self._generated(deadline)
            await self._outlet.finish()
            await self._write(response.SerializeToString())
            return response.finish
        except (HeliosError, TimeoutError):
            # The client gets the tokens from before the error.
            await self._outlet.finish()
            raise
        finally:
            self._outlet.cancel()

    async def _generated(self, deadline: float) -> worker_pb2.WorkerServiceGenerateResponse:
        """Has workers generate the whole stream, and returns its finish."""
        while True:
            worker = await self._next_worker()
            try:
                response = await self._relay(worker, deadline)
                if response.HasField("finish"):
                    return response
                self._note_redirect(worker, response.redirect)
            except WorkerLostError as loss:
                await self._note_loss(worker, loss)
            except _WorkerFullError as full:
                self._note_refusal(worker, full.refusal)

    @property
    def _under_way(self) -> bool:
        """Whether the client would lose something if the stream ended now."""
        return self.resumed > 0 or bool(self.emitted_ids)

    async def _next_worker(self) -> Worker:
        loop = asyncio.get_running_loop()
        # Beside other suspects the cause of a failure is not clear. So a stream that may have to end waits
        # until it is alone.
        patience = self._settings.isolation_seconds
        if self._failures >= self._settings.quarantine_after:
            patience = math.inf
        latest: float | None = None
        while True:
            # Once it has tokens, it goes on under their plan. Until then any ranked plan is as good.
            ranking = None if self.emitted_ids else self._ranking
            prefer = None if ranking is not None else self._plan
            worker = self._pool.choose(
                self._needs,
                prefer=prefer,
                ranking=ranking,
                avoid=self._failed,
                exclude=self._full,
                alone=self._alone,
            )
            if worker is None and self._refusal is None:
                worker = await self._pool.wait_for(
                    self._needs,
                    prefer=prefer,
                    ranking=ranking,
                    avoid=self._failed,
                    alone=self._alone,
                    under_way=self._under_way,
                )
            if worker is None:
                assert self._refusal is not None
                await self._wait_for_place(self._refusal)
            elif not self._alone or not worker.suspects:
                return worker
            else:
                latest = latest or loop.time() + patience
                if loop.time() >= latest:
                    return worker
                await self._pool.changed()

    async def _wait_for_place(self, refusal: HeliosError) -> None:
        """Called when every worker has refused. Refuses a new stream; one that is under way waits."""
        now = asyncio.get_running_loop().time()
        since = now if self._refused_since is None else self._refused_since
        if not self._under_way or now - since >= self._settings.worker_wait_seconds:
            raise refusal
        self._refused_since = since
        hint = refusal.retry_after_seconds if isinstance(refusal, OverloadedError) else 0
        await asyncio.sleep(max(hint, self._settings.resume_backoff_seconds))
        self._full.clear()
        self._refusal = None

    async def _relay(self, worker: Worker, deadline: float) -> worker_pb2.WorkerServiceGenerateResponse:
        """Has a worker generate what is left. Returns the finish or the redirect with which it ends."""
        request = self._request(worker)
        timeout = max(0.0, deadline - asyncio.get_running_loop().time())
        with worker.attempt(request, timeout, self._take, suspect=self._failures > 0) as attempt:
            try:
                response = await attempt.finish()
            except HeliosError as error:
                raise self._judged(worker, error) from error
            except WorkerFailedError as failure:
                # Its next telemetry shows whether it is back. A worker that was given up already has a
                # problem set.
                if worker.ready:
                    self._pool.suspect(worker, f"it failed under its streams: {failure}")
                raise
            finally:
                if attempt.settled:
                    self._failures, self._alone = 0, False
        if response.HasField("finish"):
            self._complete(response.finish)
        return response

    def _request(self, worker: Worker) -> worker_pb2.WorkerServiceGenerateRequest:
        """What the worker is asked for: to go on under a plan, or to choose one."""
        request = worker_pb2.WorkerServiceGenerateRequest(
            request_id=self._request_id,
            prompt_ids=self._prompt_ids,
            emitted_ids=self.emitted_ids,
            sampling=self._sampling.to_proto(),
        )
        plans = [plan for plan in worker.plans if not self._needs.models or plan.model in self._needs.models]
        plan: ServedPlan | None = None
        if self.emitted_ids:
            plan = successor(self._plan or plans[0], plans)
        elif self._ranking is not None and (best := self._ranking.best_at(plans)) is not None:
            plan = best.plan
        if plan is not None:
            request.model, request.depth = plan.model, plan.depth
            return request
        request.route.CopyFrom(self._preference.to_proto())
        if self._needs.models or not worker.has_router:
            # Without a router it serves its first plan. That is named even if the client named no model,
            # because the ids belong to this model's tokenizer.
            request.model = plans[0].model
        return request

    def _take(self, response: worker_pb2.WorkerServiceGenerateResponse) -> None:
        """Passes a worker's tokens on, except those that the client already has."""
        first, ids = len(self.emitted_ids), list[int]()
        tokens = response.chunk.tokens
        for token in tokens:
            if token.index == first + len(ids):
                ids.append(token.token_id)
            elif ids or token.index > first:
                raise WorkerLostError(f"its tokens leave a gap after index {first + len(ids) - 1}")
        if not ids:
            return
        if len(ids) < len(tokens):
            del tokens[: -len(ids)]
        self._on_first_token()
        self._outlet.put(response)
        self.emitted_ids.extend(ids)
        self.model, self._layers = tokens[-1].model, tokens[-1].exit_layer
        if self._losses or self._refused_since is not None:
            self._losses, self._refused_since = 0, None
            self._failed.clear()
            self._full.clear()

    def _complete(self, finish: generation_pb2.Finish) -> None:
        """Checks a worker's finish and adds what only this gateway knows."""
        if finish.completion_tokens != len(self.emitted_ids):
            raise WorkerLostError(
                f"it finished after {finish.completion_tokens} tokens of which {len(self.emitted_ids)} came"
            )
        finish.resumed = self.resumed
        finish.dropped_messages = self._dropped_messages
        if not finish.HasField("expected_perplexity_increase") and self._ranking is not None and finish.depth:
            ranked = self._ranking.find(ServedPlan(model=finish.model, depth=finish.depth))
            if ranked is not None:
                finish.expected_perplexity_increase = ranked.expected_perplexity_increase
                finish.plan_reason = ranked.reason

    def _note_redirect(self, worker: Worker, redirect: worker_pb2.Redirect) -> None:
        """Takes over the plans that a worker has ranked. Raises WorkerLostError if it may not redirect."""
        if self.emitted_ids or self._ranking is not None:
            raise WorkerLostError("it redirected a stream that has a plan")
        plans = tuple(
            RankedPlan(
                plan=ServedPlan(model=one.plan.model, depth=one.plan.depth),
                extra_seconds_per_token=one.extra_seconds_per_token,
                expected_perplexity_increase=one.expected_perplexity_increase,
                reason=one.reason,
            )
            for one in redirect.plans
            if one.plan.depth
        )
        if not plans:
            raise WorkerLostError("it redirected a stream without naming a plan")
        self._ranking = Ranking(plans, self._sampling.max_tokens)
        self.redirected += 1
        trace.get_current_span().add_event("redirect", {"worker": worker.address, "plan": str(plans[0].plan)})

    def _judged(self, worker: Worker, error: HeliosError) -> Exception:
        """Translates a worker's error into its consequence for the stream."""
        code = error.code
        if code in _REQUEST_FAULTS or isinstance(error, SequenceFailedError):
            return error
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return TimeoutError()
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return _WorkerFullError(error)
        reason = f"{code.name}, {error.message}"
        # The worker has ended, drains or has another model; its next telemetry shows which. Other errors
        # concern only this stream, and the worker continues to serve others.
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND):
            self._pool.suspect(worker, f"it ended a stream with {reason}")
        return _PlanChangedError(reason) if code is grpc.StatusCode.NOT_FOUND else WorkerLostError(reason)

    async def _note_loss(self, worker: Worker, loss: WorkerLostError) -> None:
        reason = str(loss)
        log.warning(
            "stream %s lost worker %s at %s after %d tokens: %s",
            self._request_id,
            worker.worker_id,
            worker.address,
            len(self.emitted_ids),
            reason,
        )
        trace.get_current_span().add_event(
            "resume",
            {"worker": worker.address, "reason": reason, "emitted_tokens": len(self.emitted_ids)},
        )
        came_from_it = bool(self.emitted_ids) and self._losses == 0
        if came_from_it or (self._plan is None and not isinstance(loss, _PlanChangedError)):
            self._plan = self._plan_at(worker)
        self._losses += 1
        self._failed.add(worker.address)
        if not isinstance(loss, _PlanChangedError):
            self.resumed += 1
        if not self.emitted_ids:
            # The plans in force may have changed, so another worker chooses again.
            self._ranking = None
        if self._needs.models and self.model:
            # A reload may have moved the stream to another model than the client named. It may continue
            # there.
            self._needs = dataclasses.replace(self._needs, models=self._needs.models | {self.model})
        if isinstance(loss, WorkerFailedError) and loss.ran:
            self._note_failure(worker, loss)
        if self._losses > self._settings.max_resumes:
            raise UnavailableError(
                f"{self._losses} workers in a row were lost without a token between, "
                f"the last one at {worker.address}: {reason}"
            )
        if self._losses > 1:
            await asyncio.sleep(self._settings.resume_backoff_seconds * 2 ** (self._losses - 2))

    def _plan_at(self, worker: Worker) -> ServedPlan | None:
        """The plan under which the lost worker computed the last token. Without tokens its first plan."""
        if not self.emitted_ids or not worker.plans:
            return worker.plan
        # An exit before the plan's last layer is possible, so the token's layers are only a lower bound.
        return successor(ServedPlan(model=self.model, depth=max(1, self._layers)), worker.plans)

    def _note_failure(self, worker: Worker, failure: WorkerFailedError) -> None:
        """Counts a failed worker. Raises QuarantinedError if this stream seems to be the cause."""
        self._failures += 1
        self._alone = not failure.settled
        if self._failures >= self._settings.quarantine_after and failure.suspects <= 1:
            raise QuarantinedError(
                f"{self._failures} workers failed one after the other while this request was under way on "
                f"them, the last one at {worker.address}: {failure}. It may be what they fail on, so it is "
                "not sent to another; look for the cause in their logs before you send it again"
            )

    def _note_refusal(self, worker: Worker, refusal: HeliosError) -> None:
        self._full.add(worker.address)
        self._refusal = refusal
