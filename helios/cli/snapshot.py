"""A snapshot of a stack from gateway, controller and profiler, for `helios status` and `top`."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from helios import channel, stack_state
from helios.client import Client, error_from
from helios.controller_client import ControllerClient, connect
from helios.errors import HeliosError, UnavailableError
from helios.rates import Rates, rates
from helios.slo import Slo
from helios.v1 import controller_pb2, inference_pb2, profiler_pb2, profiler_pb2_grpc, worker_pb2

if TYPE_CHECKING:
    from helios.history import ExitProfile, ModelProfile

_TIMEOUT_SECONDS = 5.0
# Profiles change seldom, only after an evaluation, so they are read less often.
_PROFILES_SECONDS = 5.0
# The number of bars of a histogram, and the possible heights of a bar.
_BARS = 10
_HEIGHTS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a stack at one moment. Parts that did not answer are None or empty, and in `problems`."""

    gateway: str
    status: inference_pb2.GetServingStatusResponse
    plan: controller_pb2.GetPlanResponse | None
    decisions: Sequence[controller_pb2.Decision]
    profiles: "Mapping[str, ModelProfile]"
    problems: Sequence[str]
    # The telemetry of the previous snapshot, by worker.
    before: Mapping[str, worker_pb2.Telemetry]

    @property
    def workers(self) -> list[inference_pb2.WorkerState]:
        """All known workers, in the order of their ids."""
        return sorted(self.status.workers, key=lambda worker: worker.worker_id)

    @property
    def mode(self) -> str:
        """The controller's mode; `none` without a controller."""
        return self.plan.mode if self.plan is not None else "none"

    @property
    def slo(self) -> Slo | None:
        """The objective and its bounds; None without a controller."""
        return Slo.from_proto(self.plan.slo) if self.plan is not None else None

    @property
    def router(self) -> controller_pb2.RouterState | None:
        """The router, or why there is none; None if no router is wanted."""
        known = self.plan is not None and self.plan.HasField("router")
        return self.plan.router if self.plan is not None and known else None

    def is_pinned(self, worker_id: str) -> bool:
        """Whether an operator has pinned the worker's plan."""
        return self.plan is not None and any(
            one.pinned for one in self.plan.plans if one.worker_id == worker_id
        )

    def rates(self, worker: inference_pb2.WorkerState) -> Rates:
        """The rates of the worker since the previous snapshot."""
        return rates(worker.telemetry, self.before.get(worker.worker_id))

    def exit_profile(self, plan: worker_pb2.Plan) -> "ExitProfile | None":
        """The profile of the exit at which a plan reads out its tokens."""
        profile = self.profiles.get(plan.model)
        return None if profile is None else profile.find_exit(plan.depth)

    def worker_as_dict(self, worker: inference_pb2.WorkerState) -> dict[str, Any]:
        """A worker in the form of the JSON output, with the histogram of its exit."""
        first = plan_loads(worker)[0].plan
        one, profile = self.exit_profile(first), self.profiles.get(first.model)
        histogram = None
        if one is not None and profile is not None:
            histogram = {
                "threshold": one.threshold,
                "confidence_counts": list(one.confidence_counts),
                "agreement_counts": list(one.agreement_counts),
                "agreement": one.agreement,
                "exit_share": one.share_above(one.threshold),
                "perplexity": one.perplexity,
                "profiled": profile.time,
                "requests": profile.requests,
            }
        return {
            "worker_id": worker.worker_id,
            "address": worker.address,
            "ready": worker.ready,
            "reason": worker.reason,
            "pinned": self.is_pinned(worker.worker_id),
            "open_streams": worker.open_streams,
            # MessageToDict would turn 64-bit counters into strings.
            **{
                field.name: getattr(worker.telemetry, field.name)
                for field in worker.telemetry.DESCRIPTOR.fields
                if field.name not in ("worker_id", "plans")
            },
            "plans": [
                {"model": load.plan.model, "depth": load.plan.depth, "running": load.running}
                for load in plan_loads(worker)
            ],
            "exit_histogram": histogram,
        }


def plan_loads(worker: inference_pb2.WorkerState) -> Sequence[worker_pb2.PlanLoad]:
    """The plans in force at a worker with their load, the first one first. At least one."""
    load = worker.telemetry
    # A worker that serves only one plan need not list it.
    only = worker_pb2.PlanLoad(plan=worker_pb2.Plan(model=load.model, depth=load.depth), running=load.running)
    return load.plans or [only]


class Observer:
    """Takes snapshots of a stack. Only the gateway must answer."""

    def __init__(
        self,
        gateway: str,
        client: Client,
        controller: ControllerClient | None,
        profiler: profiler_pb2_grpc.ProfilerServiceStub | None,
        profiler_address: str,
        starting: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """starting: returns the names of processes that cannot answer yet."""
        self._gateway = gateway
        self._client = client
        self._controller = controller
        self._profiler = profiler
        self._profiler_address = profiler_address
        self._starting = starting
        self._before: dict[str, worker_pb2.Telemetry] = {}
        self._profiles: dict[str, ModelProfile] = {}
        self._profiles_problem = ""
        self._profiles_due = 0.0

    def look(self, decisions: int = 0) -> Snapshot:
        """The stack now, with the last `decisions`. Raises HeliosError when the gateway is gone."""
        status = self._client.status(_TIMEOUT_SECONDS)
        problems = list(status.problems)
        plan: controller_pb2.GetPlanResponse | None = None
        made: list[controller_pb2.Decision] = []
        if self._controller is not None:
            try:
                plan = self._controller.get_plan()
                problems += plan.problems
                made = list(self._controller.decisions(decisions, follow=False)) if decisions else []
            except HeliosError as error:
                problems.append(self._silent("controller", error, "the last plan stays"))
        if self._profiler is not None and time.monotonic() >= self._profiles_due:
            self._read_profiles(self._profiler)
        problems += [self._profiles_problem] if self._profiles_problem else []
        before = self._before
        self._before = {one.worker_id: one.telemetry for one in status.workers}
        # dict.fromkeys drops repetitions: controller and gateway may both report that Redis is gone.
        return Snapshot(
            self._gateway, status, plan, made, self._profiles, list(dict.fromkeys(problems)), before
        )

    def _read_profiles(self, profiler: profiler_pb2_grpc.ProfilerServiceStub) -> None:
        from helios.history import ModelProfile

        self._profiles_due = time.monotonic() + _PROFILES_SECONDS
        try:
            answer = profiler.GetHistory(profiler_pb2.GetHistoryRequest(), timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            said = error_from(error, self._profiler_address)
            self._profiles_problem = self._silent("profiler", said, "decisions rest on the last profiles")
            return
        self._profiles = {one.model: ModelProfile.from_proto(one) for one in answer.profiles}
        self._profiles_problem = ""

    def _silent(self, name: str, error: HeliosError, consequence: str) -> str:
        """The problem to report for a service that did not answer."""
        if isinstance(error, UnavailableError) and name in self._starting():
            return f"{name}: still starting"
        return f"{name}: {error.message}; {consequence}"


@contextlib.contextmanager
def observe(target: str | None, controller: str | None, profiler: str | None) -> Iterator[Observer]:
    """Connects to the running stack, or to the gateway `target` and to the other services that are named.

    Raises UnavailableError when there is no stack.
    """
    gateway = stack_state.find_gateway(target)
    starting: Callable[[], Collection[str]] = tuple
    if target is None:
        starting = _starting
        state = stack_state.find_serving()
        controller, profiler = controller or state.controller, profiler or state.profiler
    with contextlib.ExitStack() as open_ones:
        client = open_ones.enter_context(Client(gateway))
        deciding = open_ones.enter_context(connect(controller)) if controller else None
        measuring = None
        if profiler:
            opened = open_ones.enter_context(channel.from_client(profiler))
            measuring = profiler_pb2_grpc.ProfilerServiceStub(opened)
        yield Observer(gateway, client, deciding, measuring, profiler or "", starting)


def _starting() -> Collection[str]:
    """Processes of the stack on this machine that are not ready yet."""
    state = stack_state.read(stack_state.state_dir())
    return state.starting if state else ()


def histogram(counts: Sequence[int]) -> str:
    """Numbers of tokens by confidence, from 0 to 1, as bars."""
    parts = _parts(counts)
    return _bars(parts, max(*parts, 1))


def agreement_bars(counts: Sequence[int], agreeing: Sequence[int]) -> str:
    """For each bar of `histogram`, the share of its tokens that equal the last layer's."""
    pairs = zip(_parts(agreeing), _parts(counts), strict=True)
    return _bars([part / whole if whole else 0.0 for part, whole in pairs], 1.0)


def _parts(counts: Sequence[int]) -> list[int]:
    width = -(-len(counts) // _BARS)
    return [sum(counts[start : start + width]) for start in range(0, len(counts), width)]


def _bars(values: Sequence[float], most: float) -> str:
    steps = len(_HEIGHTS) - 1
    # A value above 0 is always visible.
    return "".join(_HEIGHTS[max(value > 0, round(value / most * steps))] for value in values)
