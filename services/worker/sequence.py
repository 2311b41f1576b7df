"""A sequence of a call: what its stream gets at its end, and what its span tells."""

import time
from dataclasses import dataclass

from opentelemetry.trace import Span

from helios import telemetry
from helios.engine.interface import Finish, FinishReason, Submitted
from helios.errors import HeliosError
from helios.routing.ranked_plan import RankedPlan
from helios.v1 import generation_pb2, worker_pb2
from services.worker.choice import RoutedChoice

_REASONS = {
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.EOS: generation_pb2.FINISH_REASON_EOS,
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
}
_NO_ROUTER = "no router has been learnt yet, so what the request asks of its plan was not applied"


@dataclass(slots=True)
class ServedSequence:
    """A sequence in the engine, and the choice of its plan if a router makes it.

    `lacks_router`: whether the request has wishes for its plan that nothing can fulfil.
    """

    submitted: Submitted
    choice: RoutedChoice | None
    lacks_router: bool = False
    _redirected: bool = False

    def finish(self, finish: Finish) -> worker_pb2.WorkerServiceGenerateResponse:
        """The last message of its stream."""
        plan = self.submitted.plan
        response = worker_pb2.WorkerServiceGenerateResponse(
            finish=generation_pb2.Finish(
                reason=_REASONS[finish.reason],
                text=finish.text,
                prompt_tokens=finish.prompt_tokens,
                completion_tokens=finish.completion_tokens,
                model=plan.model,
                depth=plan.depth,
            )
        )
        if (expected := self._expected) is not None:
            response.finish.expected_perplexity_increase = expected.expected_perplexity_increase
            response.finish.plan_reason = expected.reason
        elif self.lacks_router:
            response.finish.plan_reason = _NO_ROUTER
        return response

    def redirect(self, error: HeliosError | None) -> worker_pb2.WorkerServiceGenerateResponse | None:
        """What ends its stream in place of this error, if its plan is in force elsewhere. Otherwise None."""
        redirect = None if self.choice is None else self.choice.redirect(error)
        if redirect is None:
            return None
        self._redirected = True
        return worker_pb2.WorkerServiceGenerateResponse(redirect=redirect)

    def record(self, span: Span) -> None:
        """Records in its span which plan it has had and why, and its phases as spans of their own."""
        sequence, expected = self.submitted, self._expected
        self._record_phases()
        span.set_attributes(
            {
                "helios.prompt_tokens": sequence.prompt_tokens,
                "helios.completion_tokens": sequence.completion_tokens,
                "helios.redirected": self._redirected,
            }
        )
        if not self._redirected:
            span.set_attribute("helios.model", sequence.plan.model)
            span.set_attribute("helios.depth", sequence.plan.depth)
            if expected is not None:
                increase = expected.expected_perplexity_increase
                span.set_attribute("helios.expected_perplexity_increase", increase)
                span.set_attribute("helios.plan_reason", expected.reason)

    @property
    def _expected(self) -> RankedPlan | None:
        """What the router expects of the plan that it has now, which a reload may have changed."""
        return None if self.choice is None else self.choice.ranked(self.submitted.plan)

    def _record_phases(self) -> None:
        """Records the finished phases as spans: at most four per request, none per token."""
        times = self.submitted.times
        now = times.finished or time.time_ns()
        if self.choice is not None and self.choice.made_at:
            telemetry.record_span("probe", None, times.submitted, self.choice.made_at)
        telemetry.record_span("queue", None, times.submitted, times.scheduled or now)
        if times.scheduled:
            telemetry.record_span("prefill", None, times.scheduled, times.first_token or now)
        if times.first_token:
            attributes = {"helios.preemptions": self.submitted.preemptions}
            telemetry.record_span("decode", None, times.first_token, now, attributes)
