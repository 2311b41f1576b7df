"""A client of the controller, for the commands that query or direct it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc

from helios import channel
from helios.client import error_from
from helios.stack_state import find_controller
from helios.v1 import controller_pb2, controller_pb2_grpc

_Answer = TypeVar("_Answer")

# A pin returns only when the plan is served, and a large model takes minutes to load.
_ORDER_SECONDS = 600.0
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ControllerClient:
    """A connection to one controller. Every failure is an error of helios/errors.py."""

    target: str
    stub: controller_pb2_grpc.ControllerServiceStub

    def get_plan(self) -> controller_pb2.GetPlanResponse:
        """The plan of each worker, the SLO, and current problems."""
        request = controller_pb2.GetPlanRequest()
        return self._call(lambda: self.stub.GetPlan(request, timeout=_ANSWER_SECONDS))

    def set_slo(self, slo: controller_pb2.Slo) -> controller_pb2.Slo:
        """Changes the SLO."""
        request = controller_pb2.SetSloRequest(slo=slo)
        return self._call(lambda: self.stub.SetSlo(request, timeout=_ORDER_SECONDS)).slo

    def pin(self, model: str, depth: int, worker_id: str) -> controller_pb2.PinResponse:
        """Holds workers at a plan. Returns when they serve it. An empty id means every worker."""
        request = controller_pb2.PinRequest(model=model, depth=depth, worker_id=worker_id)
        return self._call(lambda: self.stub.Pin(request, timeout=_ORDER_SECONDS))

    def unpin(self, worker_id: str) -> controller_pb2.UnpinResponse:
        """Returns workers to the policy. An empty id means every worker."""
        request = controller_pb2.UnpinRequest(worker_id=worker_id)
        return self._call(lambda: self.stub.Unpin(request, timeout=_ANSWER_SECONDS))

    def decisions(self, history: int, *, follow: bool) -> Iterator[controller_pb2.Decision]:
        """The last decisions. With `follow` also new ones, each repeated when its outcome is known."""
        request = controller_pb2.WatchDecisionsRequest(history=history, once=not follow)
        call = self.stub.WatchDecisions(request, timeout=None if follow else _ANSWER_SECONDS)
        try:
            for response in call:
                yield response.decision
        except grpc.RpcError as error:
            raise error_from(error, self.target) from error
        finally:
            call.cancel()

    def _call(self, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except grpc.RpcError as error:
            raise error_from(error, self.target) from error


@contextmanager
def connect(target: str | None) -> Iterator[ControllerClient]:
    """A connection to the target, or else to the running stack's controller.

    Raises UnavailableError when there is neither.
    """
    address = find_controller(target)
    with channel.from_client(address) as opened:
        yield ControllerClient(address, controller_pb2_grpc.ControllerServiceStub(opened))
