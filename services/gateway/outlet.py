"""Writes one stream's tokens to its client."""

import asyncio
from collections.abc import Awaitable, Callable

import grpc

from helios.v1 import worker_pb2


class Outlet:
    """Writes tokens to the client as they come, in its own task.

    Tokens that come during a write are collected and sent in one message, so a slow client slows only itself.
    The request's max_tokens limits how much can collect.

    The task's call stack is shallow on purpose. The handler is a dozen coroutines deep in gRPC and in the
    gateway. To resume it twice per token would cost more than all other code of the gateway for that token.
    """

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write
        self._gathered: worker_pb2.WorkerServiceGenerateResponse | None = None
        self._ending = False
        # The future for which the task waits while there is nothing to write.
        self._wanted: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the task."""
        self._task = asyncio.create_task(self._run())

    def put(self, response: worker_pb2.WorkerServiceGenerateResponse) -> None:
        """Adds a chunk. The outlet owns it from now on."""
        if self._gathered is None:
            self._gathered = response
        else:
            self._gathered.chunk.MergeFrom(response.chunk)
        self._wake()

    async def finish(self) -> None:
        """Returns when everything has been written. Raises the error of a failed write."""
        assert self._task is not None
        self._ending = True
        self._wake()
        await self._task

    def cancel(self) -> None:
        """Stops writing, even if collected tokens remain."""
        if self._task is not None:
            self._task.cancel()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                gathered, self._gathered = self._gathered, None
                if gathered is not None:
                    await self._write(gathered.SerializeToString())
                elif self._ending:
                    return
                else:
                    self._wanted = loop.create_future()
                    await self._wanted
        except grpc.aio.InternalError:
            # The client has disconnected; gRPC cancels the stream.
            return
