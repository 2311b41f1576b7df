"""helios.v1.ControllerService over the controller."""

import logging
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from redis.asyncio import Redis
from redis.exceptions import RedisError

from helios.errors import HeliosError, InvalidRequestError, UnavailableError
from helios.ignored_entries import IgnoredEntries
from helios.redis_outage import reason
from helios.redis_schema import DECISIONS
from helios.served import ServedPlan
from helios.server import abort
from helios.slo import Slo
from helios.v1 import controller_pb2, controller_pb2_grpc
from services.controller.controller import Controller
from services.controller.decision import WorkerPlan
from services.controller.record import NumberedDecision, follow, read_last
from services.controller.settings import ControllerSettings

log = logging.getLogger(__name__)

SERVICE_NAME = controller_pb2.DESCRIPTOR.services_by_name["ControllerService"].full_name

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_DEFAULT_HISTORY = 10
_MAX_HISTORY = 1000
# Time of one poll for new decisions, as a share of the Redis timeout.
_BLOCK_SHARE = 0.3


class ControllerService(controller_pb2_grpc.ControllerServiceServicer):
    """Serves operators."""

    def __init__(self, controller: Controller, redis: Redis, settings: ControllerSettings) -> None:
        self._controller = controller
        self._redis = redis
        self._settings = settings
        self._ignored = IgnoredEntries(log)

    async def GetPlan(
        self, request: controller_pb2.GetPlanRequest, context: _Context
    ) -> controller_pb2.GetPlanResponse:
        """The plans of each worker, the SLO, the router, and current problems."""
        controller = self._controller
        return controller_pb2.GetPlanResponse(
            plans=self._plans(),
            slo=controller.replica.state.slo.to_proto(),
            problems=[*controller.problems(), *self._ignored.problems()],
            mode=self._settings.mode,
            leading=controller.replica.is_leading,
            next_assessment=controller.next_assessment(),
            router=controller.routing.state(),
        )

    async def SetSlo(
        self, request: controller_pb2.SetSloRequest, context: _Context
    ) -> controller_pb2.SetSloResponse:
        """Changes the SLO. The resulting decision is in the record when this returns."""
        try:
            await self._controller.operator.set_slo(Slo.from_proto(request.slo))
        except (HeliosError, RedisError, OSError) as error:
            await abort(context, _as_helios(error))
        return controller_pb2.SetSloResponse(slo=self._controller.replica.state.slo.to_proto())

    async def Pin(self, request: controller_pb2.PinRequest, context: _Context) -> controller_pb2.PinResponse:
        """Holds workers at a plan. Returns when they serve it."""
        try:
            if not request.model or not request.depth:
                raise InvalidRequestError("model and depth must be set: which plan is to be held?")
            plan = ServedPlan(model=request.model, depth=request.depth)
            await self._controller.operator.pin(plan, request.worker_id)
        except (HeliosError, RedisError, OSError) as error:
            await abort(context, _as_helios(error))
        return controller_pb2.PinResponse(plans=self._plans())

    async def Unpin(
        self, request: controller_pb2.UnpinRequest, context: _Context
    ) -> controller_pb2.UnpinResponse:
        """Returns workers to the policy."""
        try:
            await self._controller.operator.unpin(request.worker_id)
        except (HeliosError, RedisError, OSError) as error:
            await abort(context, _as_helios(error))
        return controller_pb2.UnpinResponse(plans=self._plans())

    async def WatchDecisions(
        self, request: controller_pb2.WatchDecisionsRequest, context: _Context
    ) -> AsyncIterator[controller_pb2.WatchDecisionsResponse]:
        """Streams the last decisions, then new ones and outcomes as they come."""
        history = request.history if request.HasField("history") else _DEFAULT_HISTORY
        if history > _MAX_HISTORY:
            await abort(
                context, InvalidRequestError(f"history must be at most {_MAX_HISTORY}, not {history}")
            )
        try:
            last, position, ignored = await read_last(self._redis, history)
            self._ignored.update(ignored)
            for one in last:
                for response in self._told(one):
                    yield response
            if request.once:
                return
            block_seconds = self._settings.worker_timeout_seconds * _BLOCK_SHARE
            async for one in follow(self._redis, position, block_seconds, self._ignored):
                for response in self._told(one):
                    yield response
        except (RedisError, OSError) as error:
            await abort(context, _as_helios(error))

    def _told(self, one: NumberedDecision) -> list[controller_pb2.WatchDecisionsResponse]:
        """The decision as a message. Empty if its figures do not fit into a message."""
        try:
            return [_response(one)]
        except (TypeError, ValueError) as error:
            self._ignored.note(f"decision {one.number} of {DECISIONS}", str(error))
            return []

    def _plans(self) -> list[controller_pb2.WorkerPlan]:
        return [_plan(plan) for plan in self._controller.plans()]


def _as_helios(error: Exception) -> HeliosError:
    if isinstance(error, HeliosError):
        return error
    return UnavailableError(f"{reason(error)}; try again when that is over")


def _plan(plan: WorkerPlan) -> controller_pb2.WorkerPlan:
    return controller_pb2.WorkerPlan(
        worker_id=plan.worker_id, model=plan.model, depth=plan.depth, pinned=plan.pinned
    )


def _response(one: NumberedDecision) -> controller_pb2.WatchDecisionsResponse:
    decision, outcome = one.entry.decision, None
    if one.outcome is not None:
        outcome = controller_pb2.Outcome(**one.outcome.model_dump(exclude={"kind", "time"}))
    return controller_pb2.WatchDecisionsResponse(
        decision=controller_pb2.Decision(
            number=one.number,
            time=one.entry.time,
            trigger=decision.trigger,
            options=[
                controller_pb2.Option(
                    model=option.model,
                    depth=option.depth,
                    tokens_per_second=option.tokens_per_second,
                    tpot_seconds=option.tpot_seconds,
                    perplexity_increase=option.perplexity_increase,
                    perplexity_increase_error=option.perplexity_increase_error,
                    cost_seconds=option.cost_seconds,
                    refused=option.refused,
                )
                for option in decision.options
            ],
            chosen=[_plan(plan) for plan in decision.chosen],
            reason=decision.reason,
            outcome=outcome,
        )
    )
