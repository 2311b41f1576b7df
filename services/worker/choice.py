"""The choice of a plan for one request: by its request, or by a router from what its prompt shows."""

import hashlib
import time
from collections.abc import Collection, Sequence

from helios.errors import HeliosError, InvalidRequestError, PlanNotServedError, UnknownModelError
from helios.routing.preference import Preference
from helios.routing.probe import Probe
from helios.routing.ranked_plan import RankedPlan
from helios.routing.router import Router
from helios.routing.unlike_prompts import UnlikePrompts
from helios.served import ServedPlan
from helios.v1 import worker_pb2


class RoutedChoice:
    """Ranks the plans for one prompt, and keeps the ranking. The engine calls it with the prompt's probe."""

    def __init__(
        self,
        router: Router,
        preference: Preference,
        request_id: str,
        among: Collection[ServedPlan] | None,
        unlike: UnlikePrompts,
    ) -> None:
        """among: the plans to choose from. None: all that the router knows. unlike: of this
        worker; this prompt is added.
        """
        self._router = router
        self._preference = preference
        self._lot = _lot(request_id)
        self._among = among
        self._unlike = unlike
        self._ranked: Sequence[RankedPlan] = ()
        # When the probe ended, in nanoseconds since the Unix epoch. 0: not yet.
        self.made_at = 0

    def first(self, first_ids: Sequence[int]) -> str:
        """The model that is probed first."""
        return self._router.first_model(first_ids)

    def __call__(self, probe: Probe, *, is_complete: bool) -> ServedPlan | None:
        """The best plan, whether it is in force or not. None: the router needs all readings."""
        ranked = self._router.rank(
            probe,
            lot=self._lot,
            is_complete=is_complete,
            max_perplexity_increase=self._preference.max_perplexity_increase,
            objective=self._preference.objective,
            among=self._among,
            unlike=self._unlike,
        )
        if ranked is None:
            return None
        readings = {model: one.nats for model, one in probe.readings.items()}
        self._unlike.add(readings if ranked[0].is_unlike else None)
        self._ranked, self.made_at = ranked, time.time_ns()
        return ranked[0].plan

    def ranked(self, plan: ServedPlan) -> RankedPlan | None:
        """What was expected of a plan. None: it was not among the ranked ones."""
        return next((one for one in self._ranked if one.plan == plan), None)

    def redirect(self, error: HeliosError | None) -> worker_pb2.Redirect | None:
        """The answer if the sequence ended because the best plan is in force elsewhere. Otherwise None."""
        if not isinstance(error, PlanNotServedError) or not self._ranked:
            return None
        return worker_pb2.Redirect(
            plans=[
                worker_pb2.RankedPlan(
                    plan=plan_message(one.plan),
                    extra_seconds_per_token=one.extra_seconds_per_token,
                    expected_perplexity_increase=one.expected_perplexity_increase,
                    reason=one.reason,
                )
                for one in self._ranked
            ]
        )


def _lot(request_id: str) -> float:
    """A number in [0, 1) that is the same whenever a request is sent again."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def named_plan(
    request: worker_pb2.WorkerServiceGenerateRequest, served: Sequence[ServedPlan]
) -> ServedPlan | None:
    """The plan in force that a request names by its model, its depth or both. None: it names none.

    Of several plans it is the first one. Raises UnknownModelError if no plan has the model,
    PlanNotServedError if none of these has the depth, InvalidRequestError if the request has a route too.
    """
    if request.depth and request.HasField("route"):
        raise InvalidRequestError("the request has both depth and route; set one of them")
    plans = [plan for plan in served if request.model in ("", plan.model)]
    if not plans:
        names = list(dict.fromkeys(plan.model for plan in served))
        told = ", ".join(map(repr, names)) + (" is" if len(names) == 1 else " are")
        raise UnknownModelError(f"model {request.model!r} is not served here; {told}")
    if not request.depth:
        return plans[0] if request.model else None
    found = next((plan for plan in plans if plan.depth == request.depth), None)
    if found is None:
        wanted = f"{request.model or 'any model'} at depth {request.depth}"
        raise PlanNotServedError(f"{wanted} is not served here; served: {', '.join(map(str, plans))}")
    return found


def plan_message(plan: ServedPlan) -> worker_pb2.Plan:
    """A plan as a message."""
    return worker_pb2.Plan(model=plan.model, depth=plan.depth)
