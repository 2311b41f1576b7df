"""Runs the whole system as processes on one machine: starts, watches and stops all services."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from helios import channel, embedded_redis, redis_client, redis_url, stack_state
from helios.errors import SettingsError, UnavailableError
from helios.hardware import available_memory
from helios.redis_outage import probe, reason
from helios.reservation import Reservation
from helios.stack_state import StackState
from helios.supervisor import LOG_BYTES, LOG_FILES, Child
from helios.v1 import controller_pb2, controller_pb2_grpc, inference_pb2, inference_pb2_grpc

log = logging.getLogger(__name__)

# The line that every service prints on stdout once it serves.
_READY_LINE = re.compile(r"^ready address=\S+")
# Loading a checkpoint of many GB from a slow disk takes minutes.
_START_SECONDS = 600.0
_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 5.0
# Longest wait of a start for its controller to lead: twice the lease of a killed one.
_STANDBY_SECONDS = 10.0
_REDIS_SECONDS = 5.0
# Longer than the services' own grace period for open streams plus the limit on their stops.
_GRACE_SECONDS = 25.0
_ANY_PORT = "127.0.0.1:0"
# Share of the memory available at the start that all workers together may use.
_WORKERS_MEMORY_SHARE = 0.8
_MEMORY_VARIABLE = "HELIOS_WORKER_MEMORY_BYTES"


@dataclass(frozen=True, slots=True)
class StackSettings:
    """What to run. `gateway` is host:port (port 0: any free port). `redis_url` None starts a Redis server."""

    models_dir: Path
    model: str
    depth: int
    exit_mode: str
    precision: str
    workers: int
    threads: int
    gateway: str
    redis_url: str | None = None
    context_tokens: int | None = None
    """Limit of the workers' contexts. None: as many tokens as a model has positions."""
    profiler: bool = True
    controller: str = "active"
    """The controller's mode: active, advisory or off; or none, for no controller."""
    log_bytes: int = LOG_BYTES
    """Size at which a process's log file is rotated."""
    log_files: int = LOG_FILES
    """How many log files of a process are kept, the current one included; at least 2."""


class Stack:
    """The processes of one stack: gateway, workers, controller, profiler and Redis."""

    def __init__(
        self,
        settings: StackSettings,
        directory: Path,
        *,
        on_progress: Callable[[Iterable[str]], None],
        on_line: Callable[[str, str], None],
    ) -> None:
        """Starts nothing yet. Raises SettingsError when the gateway's address is in use.

        `on_progress` is called whenever a process answers for the first time, with the names of those that
        have not answered yet. `on_line` is called with a process's name and each of its log lines.
        """
        # Held as long as the stack runs: a process that is started again finds its port free.
        self._reservations: list[Reservation] = []
        gateway_address = self._reserve(settings.gateway, "--gateway")
        self.state = StackState(
            pid=os.getpid(),
            gateway=gateway_address,
            redis_url=settings.redis_url or f"redis://{self._reserve(_ANY_PORT, '--redis')}",
            model=settings.model,
            depth=settings.depth,
            started=time.time(),
            models_dir=str(settings.models_dir),
            profiler=self._reserve(_ANY_PORT, "--profiler") if settings.profiler else "",
            controller="" if settings.controller == "none" else self._reserve(_ANY_PORT, "--controller"),
        )
        self._settings = settings
        self._directory = directory
        self._on_progress = on_progress
        self._on_line = on_line
        self._memory_bytes = _memory_per_worker(settings.workers)
        self._redis = None if settings.redis_url else self._redis_child()
        self._workers = [self._worker_child(f"worker-{index}") for index in range(settings.workers)]
        self._gateway = self._service_child("gateway", "gateway", address=gateway_address)
        self._profiler = self._profiler_child() if settings.profiler else None
        self._controller = self._controller_child() if self.state.controller else None
        self._tasks: set[asyncio.Task[None]] = set()
        # Names of the processes that have answered once.
        self._answered: set[str] = set()
        self._record()

    @property
    def children(self) -> list[Child]:
        """All processes, in the order in which they stop."""
        last = [child for child in (self._controller, self._profiler, self._redis) if child is not None]
        return [self._gateway, *self._workers, *last]

    async def start(self) -> None:
        """Returns once everything answers; see `_until_serving` and `_until_deciding`.

        Raises UnavailableError with the reason when a process ends before that.
        """
        if self._redis is not None:
            await self._await_start([self._redis], self._until_ready(self._redis))
        else:
            await _check_redis(self.state.redis_url)
            self._on_progress(self.state.starting)
        # All start at once. One after the other would take half as long again.
        beside = [child for child in (self._profiler, self._controller) if child is not None]
        await self._await_start([*self._workers, self._gateway, *beside], self._until_all_answer())
        self.state = replace(self.state, ready=True)
        self._record()

    async def watch(self) -> None:
        """Runs until a process can no longer be kept running, then raises the reason."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Stops the gateway first, so that no stream is offered to a stopping worker, and Redis last."""
        await self._gateway.stop(_GRACE_SECONDS)
        beside = [child for child in (self._controller, self._profiler) if child is not None]
        await asyncio.gather(*(child.stop(_GRACE_SECONDS) for child in (*self._workers, *beside)))
        if self._redis is not None:
            await self._redis.stop(_GRACE_SECONDS)
        # The first failure has been raised. Processes that failed with it have their failures in their logs.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for reservation in self._reservations:
            reservation.close()

    def kill(self) -> None:
        """Kills every process at once."""
        for child in self.children:
            child.kill()

    def _reserve(self, address: str, option: str) -> str:
        reservation = Reservation(address, option)
        self._reservations.append(reservation)
        return reservation.address

    async def _await_start(self, children: list[Child], started: Coroutine[None, None, object]) -> None:
        tasks = {child.start() for child in children}
        self._tasks |= tasks
        waiting = asyncio.ensure_future(started)
        try:
            done, _ = await asyncio.wait(
                {waiting, *self._tasks}, timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                await task
        finally:
            waiting.cancel()
        if not done:
            late = ", ".join(self.state.starting)
            logs = stack_state.logs_dir(self._directory)
            raise UnavailableError(f"not ready after {_START_SECONDS:g} s: {late} (logs: {logs})")

    async def _until_all_answer(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._until_serving())
            if self._controller is not None:
                tasks.create_task(self._until_deciding(self._controller))
            if self._profiler is not None:
                tasks.create_task(self._until_ready(self._profiler))

    async def _until_ready(self, child: Child) -> None:
        await child.ready.wait()
        self._answers(child.name)

    def _answers(self, *names: str) -> None:
        if not self._answered.issuperset(names):
            self._answered.update(names)
            self._record()
            self._on_progress(self.state.starting)

    async def _until_deciding(self, controller: Child) -> None:
        """Returns once the controller leads and has heard from every worker. Then it obeys commands."""
        await controller.ready.wait()
        expected = {worker.name for worker in self._workers}
        patience_ends = time.monotonic() + _STANDBY_SECONDS
        async with channel.to_service_async(self.state.controller) as opened:
            stub = controller_pb2_grpc.ControllerServiceStub(opened)
            plan = controller_pb2.GetPlanResponse()
            # If the user named the Redis, another stack's controller may lead there for as long as it lives.
            while not (plan.leading or time.monotonic() > patience_ends) or not (
                expected <= {one.worker_id for one in plan.plans}
            ):
                await asyncio.sleep(_POLL_SECONDS)
                # If the controller has ended, its task notices.
                with contextlib.suppress(grpc.aio.AioRpcError):
                    plan = await stub.GetPlan(controller_pb2.GetPlanRequest(), timeout=_ANSWER_SECONDS)
        if not plan.leading:
            log.warning("the controller does not lead: %s", "; ".join(plan.problems))
        self._answers(controller.name)

    async def _until_serving(self) -> None:
        """Returns once the gateway reports every worker as ready."""
        await self._gateway.ready.wait()
        expected = {worker.name for worker in self._workers}
        async with channel.to_service_async(self.state.gateway) as opened:
            stub = inference_pb2_grpc.InferenceServiceStub(opened)
            while True:
                # A gateway that has just started may not answer yet. If it has ended, its task notices.
                with contextlib.suppress(grpc.aio.AioRpcError):
                    status = await stub.GetServingStatus(
                        inference_pb2.GetServingStatusRequest(),
                        wait_for_ready=True,
                        timeout=_ANSWER_SECONDS,
                    )
                    ready = {worker.worker_id for worker in status.workers if worker.ready}
                    self._answers(self._gateway.name, *(expected & ready))
                    if expected <= ready:
                        return
                await asyncio.sleep(_POLL_SECONDS)

    def _record(self) -> None:
        pids = {child.name: child.pid for child in self.children}
        starting = [child.name for child in self.children if child.name not in self._answered]
        processes = {name: pid for name, pid in pids.items() if pid}
        self.state = replace(self.state, processes=processes, starting=starting)
        stack_state.write(self._directory, self.state)

    def _child(self, name: str, command: list[str], ready_line: re.Pattern[str], **environment: str) -> Child:
        return Child(
            name,
            command,
            ready_line=ready_line,
            log_path=stack_state.logs_dir(self._directory) / f"{name}.log",
            on_change=self._record,
            environment=environment,
            log_bytes=self._settings.log_bytes,
            log_files=self._settings.log_files,
            on_line=lambda line: self._on_line(name, line),
        )

    def _service_child(self, service: str, name: str, **options: object) -> Child:
        # -P: do not import from a directory `services` in the working directory.
        command = [sys.executable, "-P", "-m", f"services.{service}"]
        for option, value in options.items():
            command += [f"--{option.replace('_', '-')}", str(value)]
        # Not a flag: everybody can read flags (ps), and the URL may contain a password.
        environment = {f"HELIOS_{service.upper()}_REDIS_URL": self.state.redis_url}
        return self._child(name, command, _READY_LINE, **environment)

    def _redis_child(self) -> Child:
        port = int(self.state.redis_url.rpartition(":")[2])
        command = embedded_redis.server_command(port, self._directory)
        return self._child("redis", command, embedded_redis.READY_LINE)

    @property
    def _context(self) -> dict[str, object]:
        """The option that limits contexts, if they are limited."""
        limit = self._settings.context_tokens
        return {} if limit is None else {"context_tokens": limit}

    def _profiler_child(self) -> Child:
        return self._service_child(
            "profiler",
            "profiler",
            address=self.state.profiler,
            models_dir=self._settings.models_dir,
            # Steps are timed with the same number of threads as in the workers.
            timing_threads=self._settings.threads,
            precision=self._settings.precision,
            **self._context,
        )

    def _controller_child(self) -> Child:
        options = dict(self._context)
        if self._settings.profiler:
            options["profiler"] = self.state.profiler
        return self._service_child(
            "controller",
            "controller",
            address=self.state.controller,
            models_dir=self._settings.models_dir,
            mode=self._settings.controller,
            **options,
        )

    def _worker_child(self, name: str) -> Child:
        settings = self._settings
        plan_file = self._directory / f"{name}.plan.json"
        # A new stack serves the plan of its settings, not the plan to which an earlier stack was moved.
        plan_file.unlink(missing_ok=True)
        options = dict(self._context)
        if self._memory_bytes is not None:
            options["memory_bytes"] = self._memory_bytes
        return self._service_child(
            "worker",
            name,
            worker_id=name,
            address=_ANY_PORT,
            models_dir=settings.models_dir,
            model=settings.model,
            depth=settings.depth,
            exit_mode=settings.exit_mode,
            precision=settings.precision,
            threads=settings.threads,
            plan_file=plan_file,
            **options,
        )


async def serve(
    settings: StackSettings,
    directory: Path,
    on_ready: Callable[[StackState], None],
    *,
    on_progress: Callable[[Iterable[str]], None],
    on_line: Callable[[str, str], None],
) -> None:
    """Runs a stack until SIGINT, SIGTERM or SIGHUP. A second signal ends it without grace.

    `directory` holds the state and logs of one stack at a time. `on_ready` is called once all processes
    answer. `Stack` describes the other two callbacks.
    Raises SettingsError when it cannot start as asked, UnavailableError when a process ends at start.
    """
    with stack_state.hold(directory):
        stack = Stack(settings, directory, on_progress=on_progress, on_line=on_line)
        stopped = asyncio.Event()

        def on_signal() -> None:
            if stopped.is_set():
                stack.kill()
            stopped.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal)
        stopping = loop.create_task(stopped.wait())
        serving = loop.create_task(_start_and_watch(stack, on_ready))
        try:
            done, _ = await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if serving in done:
                await serving
        finally:
            serving.cancel()
            stopping.cancel()
            await stack.stop()


async def _start_and_watch(stack: Stack, on_ready: Callable[[StackState], None]) -> None:
    await stack.start()
    on_ready(stack.state)
    await stack.watch()


async def _check_redis(url: str) -> None:
    """Checks that the Redis that the user named can do what a stack needs.

    Services wait for a Redis that comes back, but a wrong URL stays wrong. Raises SettingsError when it is
    not a URL or Redis refuses a command, UnavailableError when no Redis answers.
    """
    shown, hint = redis_url.shown(url), redis_url.hint(url)
    also = f"; {hint}" if hint else ""
    try:
        redis_url.checked(url)
        async with redis_client.connect(url, _REDIS_SECONDS) as redis:
            await probe(redis)
    except (ResponseError, AuthenticationError) as error:
        raise SettingsError(
            f"the Redis at {shown} cannot be used: {reason(error)}; or leave out --redis{also}"
        ) from error
    except (RedisError, OSError) as error:
        raise UnavailableError(
            f"no Redis answers at {shown} ({error}); start it, or leave out --redis{also}"
        ) from error
    except (TypeError, ValueError) as error:
        raise SettingsError(f"--redis: {shown!r} is no Redis URL: {error}") from error
    if hint:
        log.warning("--redis: %s", hint)


def _memory_per_worker(workers: int) -> int | None:
    """Bytes for each worker, which cannot know how many others start. None: the worker decides."""
    if os.environ.get(_MEMORY_VARIABLE):
        return None
    return int(available_memory() * _WORKERS_MEMORY_SHARE) // workers
