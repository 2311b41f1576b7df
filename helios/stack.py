"""The whole system as processes of one machine: Redis, workers, a gateway, started, watched and stopped."""

import asyncio
import contextlib
import logging
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from redis.exceptions import RedisError

from helios import embedded_redis, redis_client, stack_state
from helios.errors import SettingsError, UnavailableError
from helios.hardware import available_memory
from helios.server import CHANNEL_OPTIONS
from helios.settings import without_passwords
from helios.stack_state import StackState
from helios.supervisor import Child
from helios.v1 import inference_pb2, inference_pb2_grpc

log = logging.getLogger(__name__)

# What every service prints on stdout once it serves.
_READY_LINE = re.compile(r"^ready address=\S+")
# A checkpoint of many GB from a slow disk takes minutes.
_START_SECONDS = 600.0
_POLL_SECONDS = 0.05
_FOLLOW_SECONDS = 0.2
# Longer than the services' own, in which open streams may end, and the bound of their stops.
_GRACE_SECONDS = 25.0
# Of the memory available at the start, for all workers together.
_WORKERS_MEMORY_SHARE = 0.8
_MEMORY_VARIABLE = "HELIOS_WORKER_MEMORY_BYTES"
# Below those that Linux gives to outgoing connections, one of which could take a port between the check and
# the start of the process that listens there.
_FREE_PORTS = range(20_000, 32_000)
_PORT_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class StackSettings:
    """What to run. `gateway` is host:port (port 0: any free one); `redis_url` None starts a Redis server."""

    models_dir: Path
    model: str
    depth: int
    exit_mode: str
    precision: str
    workers: int
    threads: int
    gateway: str
    redis_url: str | None = None
    profiler: bool = True
    controller: str = "active"
    """Its mode: active, advisory or off; or none, without a controller."""


class Stack:
    """The processes of one stack, in the order in which they stop: gateway, workers, Redis."""

    def __init__(self, settings: StackSettings, directory: Path) -> None:
        """Starts nothing yet. Raises SettingsError when the gateway's address is taken."""
        gateway_address = claim_address(settings.gateway, "--gateway")
        self.state = StackState(
            pid=os.getpid(),
            gateway=gateway_address,
            redis_url=settings.redis_url or f"redis://{claim_address('127.0.0.1:0', '--redis')}",
            model=settings.model,
            depth=settings.depth,
            started=time.time(),
            models_dir=str(settings.models_dir),
            profiler=claim_address("127.0.0.1:0", "--profiler") if settings.profiler else "",
            controller="" if settings.controller == "none" else claim_address("127.0.0.1:0", "--controller"),
        )
        self._settings = settings
        self._directory = directory
        self._memory_bytes = _memory_per_worker(settings.workers)
        self._redis = None if settings.redis_url else self._redis_child()
        self._workers = [self._worker_child(f"worker-{index}") for index in range(settings.workers)]
        self._gateway = self._service_child("gateway", "gateway", address=gateway_address)
        self._profiler = self._profiler_child() if settings.profiler else None
        self._controller = self._controller_child() if self.state.controller else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._beside: list[asyncio.Task[None]] = []
        self._record()

    @property
    def children(self) -> list[Child]:
        """All processes, in the order in which they stop."""
        last = [child for child in (self._controller, self._profiler, self._redis) if child is not None]
        return [self._gateway, *self._workers, *last]

    async def start(self) -> None:
        """Returns once the gateway reports every worker as ready.

        Raises UnavailableError when a process ends before that, with what it said last.
        """
        if self._redis is not None:
            await self._await_start([self._redis], self._redis.ready.wait())
        else:
            await _check_redis(self.state.redis_url)
        await self._await_start([*self._workers, self._gateway], self._until_serving())
        # The profiler first: the controller asks it at once.
        beside = [child for child in (self._profiler, self._controller) if child is not None]
        self._beside = [asyncio.create_task(_run_beside(child)) for child in beside]
        self.state = replace(self.state, ready=True)
        self._record()

    async def watch(self) -> None:
        """Runs until a process can no longer be kept running; raises what prevents it."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Stops the gateway first, so that no stream is offered to a worker that stops; Redis last."""
        await self._gateway.stop(_GRACE_SECONDS)
        beside = [child for child in (self._controller, self._profiler) if child is not None]
        await asyncio.gather(*(child.stop(_GRACE_SECONDS) for child in (*self._workers, *beside)))
        if self._redis is not None:
            await self._redis.stop(_GRACE_SECONDS)
        # What ended one of them has been raised; what ended others with it is in their logs.
        await asyncio.gather(*self._tasks, *self._beside, return_exceptions=True)

    def kill(self) -> None:
        """Ends every process at once."""
        for child in self.children:
            child.kill()

    async def follow_logs(self) -> None:
        """Copies what the processes log to stderr, each line after its process's name, until cancelled."""
        offsets = dict.fromkeys(self.children, 0)
        while True:
            for child, offset in offsets.items():
                if not child.is_started:
                    continue
                with child.log_path.open("rb") as source:
                    source.seek(offset)
                    text = source.read()
                whole_lines = text[: text.rfind(b"\n") + 1]
                offsets[child] += len(whole_lines)
                for line in whole_lines.decode(errors="replace").splitlines():
                    sys.stderr.write(f"{child.name} | {line}\n")
            await asyncio.sleep(_FOLLOW_SECONDS)

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
            late = ", ".join(child.name for child in children if not child.ready.is_set()) or "workers"
            logs = stack_state.logs_dir(self._directory)
            raise UnavailableError(f"not ready after {_START_SECONDS:g} s: {late} (logs: {logs})")

    async def _until_serving(self) -> None:
        await self._gateway.ready.wait()
        expected = {worker.name for worker in self._workers}
        async with grpc.aio.insecure_channel(self.state.gateway, options=CHANNEL_OPTIONS) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            while True:
                # A gateway that has just started may not answer yet; a dead one is noticed by its task.
                with contextlib.suppress(grpc.aio.AioRpcError):
                    status = await stub.GetServingStatus(
                        inference_pb2.GetServingStatusRequest(), wait_for_ready=True, timeout=5
                    )
                    if expected <= {worker.worker_id for worker in status.workers if worker.ready}:
                        return
                await asyncio.sleep(_POLL_SECONDS)

    def _record(self) -> None:
        pids = {child.name: child.pid for child in self.children}
        starting = [child.name for child in self.children if child.pid and not child.ready.is_set()]
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
        )

    def _service_child(self, service: str, name: str, **options: object) -> Child:
        # -P: a directory `services` where the command runs is not ours.
        command = [sys.executable, "-P", "-m", f"services.{service}"]
        for option, value in options.items():
            command += [f"--{option.replace('_', '-')}", str(value)]
        # No flag: everybody can read those (ps), and the URL may hold a password.
        environment = {f"HELIOS_{service.upper()}_REDIS_URL": self.state.redis_url}
        return self._child(name, command, _READY_LINE, **environment)

    def _redis_child(self) -> Child:
        port = int(self.state.redis_url.rpartition(":")[2])
        command = embedded_redis.server_command(port, self._directory)
        return self._child("redis", command, embedded_redis.READY_LINE)

    def _profiler_child(self) -> Child:
        return self._service_child(
            "profiler",
            "profiler",
            address=self.state.profiler,
            models_dir=self._settings.models_dir,
            # Steps are timed as the workers run them.
            timing_threads=self._settings.threads,
            precision=self._settings.precision,
        )

    def _controller_child(self) -> Child:
        options: dict[str, object] = {}
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
        options: dict[str, object] = {}
        if self._memory_bytes is not None:
            options["memory_bytes"] = self._memory_bytes
        return self._service_child(
            "worker",
            name,
            worker_id=name,
            address="127.0.0.1:0",
            models_dir=settings.models_dir,
            model=settings.model,
            depth=settings.depth,
            exit_mode=settings.exit_mode,
            precision=settings.precision,
            threads=settings.threads,
            **options,
        )


async def _run_beside(child: Child) -> None:
    """Keeps a child running that serving does not depend on."""
    try:
        await child.start()
    except UnavailableError as error:
        log.warning("going on without the %s: %s", child.name, error)


async def serve(
    settings: StackSettings, directory: Path, on_ready: Callable[[StackState], None], *, follow_logs: bool
) -> None:
    """Runs a stack until SIGINT, SIGTERM or SIGHUP; a second signal ends it without grace.

    `directory` holds its state and logs, and one stack at a time. `on_ready` is called once it serves.
    Raises SettingsError when it cannot start as asked, UnavailableError when a process ends at start.
    """
    with stack_state.hold(directory):
        stack = Stack(settings, directory)
        stopped = asyncio.Event()

        def on_signal() -> None:
            if stopped.is_set():
                stack.kill()
            stopped.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal)
        following = loop.create_task(stack.follow_logs()) if follow_logs else None
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
            if following is not None:
                following.cancel()


async def _start_and_watch(stack: Stack, on_ready: Callable[[StackState], None]) -> None:
    await stack.start()
    on_ready(stack.state)
    await stack.watch()


async def _check_redis(url: str) -> None:
    """Raises when no Redis answers: services wait for theirs to come back, but a wrong URL never does."""
    try:
        async with redis_client.connect(url) as redis:
            await redis.ping()
    except (RedisError, OSError) as error:
        raise UnavailableError(
            f"no Redis answers at {without_passwords(url)} ({error}); start it, or leave out --redis"
        ) from error
    except ValueError as error:
        raise SettingsError(f"--redis: {without_passwords(url)!r} is no Redis URL: {error}") from error


def claim_address(address: str, option: str) -> str:
    """The address, checked to be free, with a free port in place of port 0.

    Raises SettingsError naming the option that chooses it.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{option}: {address!r} is not HOST:PORT")
    ports = [int(port)] if int(port) else random.sample(_FREE_PORTS, _PORT_ATTEMPTS)
    for number in ports:
        try:
            _check_free(host.strip("[]"), number)
        except OSError as error:
            reason = error.strerror
        else:
            return f"{host}:{number}"
    raise SettingsError(
        f"cannot listen on {address}: {reason}; choose another address with {option} HOST:PORT"
    )


def _check_free(host: str, port: int) -> None:
    family, kind, _, _, location = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(location)


def _memory_per_worker(workers: int) -> int | None:
    """Bytes for each worker, which cannot know how many start beside it; None: the worker decides."""
    if os.environ.get(_MEMORY_VARIABLE):
        return None
    return int(available_memory() * _WORKERS_MEMORY_SHARE) // workers
