"""The stack that follows the traffic: checks that it can, and reads what its controller decides."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import grpc

from bench.load import clients
from helios.client import AsyncClient, error_from
from helios.controller_client import ControllerClient
from helios.errors import SettingsError, UnavailableError
from helios.slo import Slo
from helios.v1 import controller_pb2, worker_pb2, worker_pb2_grpc

# A profiler that has just started must first import its engine, and other work slows its evaluations.
DECISION_SECONDS = 120.0
ANSWER_SECONDS = 10.0
_LOOK_SECONDS = 0.1


async def read_workers(gateway: str) -> dict[str, worker_pb2.GetStatusResponse]:
    """The status of every ready worker, by id. Raises UnavailableError when there is none."""
    async with AsyncClient(gateway) as client:
        answer = await client.status(ANSWER_SECONDS)
    found = {}
    for worker in answer.workers:
        if worker.ready:
            async with clients.connect(worker.address) as channel:
                stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
                request = worker_pb2.GetStatusRequest()
                try:
                    found[worker.worker_id] = await stub.GetStatus(request, timeout=ANSWER_SECONDS)
                except grpc.aio.AioRpcError as error:
                    raise error_from(error, worker.address) from error
    if not found:
        raise UnavailableError("the running stack has no ready worker; see `helios status`")
    return found


def check(controller: ControllerClient, workers: Mapping[str, worker_pb2.GetStatusResponse]) -> None:
    """Raises SettingsError when the stack would not follow traffic by itself."""
    mode = controller.get_plan().mode
    if mode != "active":
        raise SettingsError(
            f"the running stack's controller is in mode {mode} and changes nothing; start it with "
            "`helios up --controller active`, or stop it: the demo then starts one of its own"
        )
    modes = {status.exit_mode for status in workers.values()}
    if modes != {"greedy"}:
        raise SettingsError(
            f"the running stack's workers exit in mode {', '.join(sorted(modes))}, HELIOS in mode greedy; "
            "start it without --exit-mode, or stop it: the demo then starts one of its own"
        )


@contextlib.contextmanager
def default_orders(controller: ControllerClient) -> Iterator[None]:
    """Sets the default objective and removes pins. At the end it restores the operator's orders."""
    before = controller.get_plan()
    held = [one for one in before.plans if one.pinned]
    slo, default = Slo.from_proto(before.slo), Slo()
    try:
        if held:
            controller.unpin("")
        if slo != default:
            controller.set_slo(default.to_proto())
        yield
    finally:
        plans = {(one.model, one.depth) for one in held}
        if len(plans) == 1 and len(held) == len(before.plans):
            controller.pin(held[0].model, held[0].depth, "")
        else:
            for one in held:
                controller.pin(one.model, one.depth, one.worker_id)
        if slo != default:
            controller.set_slo(slo.to_proto())


def await_decision(controller: ControllerClient, after: int) -> controller_pb2.Decision:
    """The first decision after number `after`. Raises UnavailableError, which says what is wrong."""
    request = controller_pb2.WatchDecisionsRequest()
    call = controller.stub.WatchDecisions(request, timeout=DECISION_SECONDS)
    try:
        for answer in call:
            if answer.decision.number > after:
                return answer.decision
        raise UnavailableError("the controller ended the record of its decisions; is it running?")
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise error_from(error, controller.target) from error
        amiss = "; ".join(controller.get_plan().problems) or "it does not say why"
        raise UnavailableError(
            f"the controller has not decided within {DECISION_SECONDS:g} s: {amiss}"
        ) from error
    finally:
        call.cancel()


def await_rollout(controller: ControllerClient, decision: controller_pb2.Decision) -> None:
    """Returns once the workers serve the decided plan, or after a time limit. The timeline shows the rest."""
    chosen = {(one.worker_id, one.model, one.depth) for one in decision.chosen}
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        if chosen <= {(one.worker_id, one.model, one.depth) for one in controller.get_plan().plans}:
            return
        time.sleep(_LOOK_SECONDS)
