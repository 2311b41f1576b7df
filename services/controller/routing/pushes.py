"""Gives routers to workers, and takes them away."""

import asyncio
import logging
from collections.abc import Sequence

import grpc

from helios.v1 import worker_pb2
from services.controller.fleet import Worker

log = logging.getLogger(__name__)


class Pushes:
    """Sends to several workers at once. One that refuses, or does not answer, does not hold up the others."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._running: dict[str, asyncio.Task[None]] = {}
        # What a worker refused: the router's number and the reason.
        self._refused: dict[str, tuple[int, str]] = {}

    def problems(self) -> list[str]:
        """Messages about workers that refused their router."""
        return [
            f"{worker_id} refused router {number}: {why}"
            for worker_id, (number, why) in self._refused.items()
        ]

    def push(self, workers: Sequence[Worker], number: int, router: bytes) -> None:
        """Begins to send a router to those of the workers that have another one. 0 and b"": none."""
        for worker in workers:
            name = worker.worker_id
            has_it = worker.telemetry is None or worker.telemetry.router_number == number
            if has_it or name in self._running or self._refused.get(name, (-1, ""))[0] == number:
                continue
            self._running[name] = asyncio.create_task(self._send(worker, number, router))

    async def close(self) -> None:
        """Ends what is being sent."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _send(self, worker: Worker, number: int, router: bytes) -> None:
        name = worker.worker_id
        try:
            request = worker_pb2.SetRouterRequest(router=router)
            await worker.stub.SetRouter(request, timeout=self._timeout_seconds)
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}, {error.details()}"
            log.warning("%s did not take router %d: %s", name, number, why)
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                self._refused[name] = (number, why)
        else:
            self._refused.pop(name, None)
        finally:
            del self._running[name]
