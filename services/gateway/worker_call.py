"""The call that carries all of a gateway's streams on one worker: a message per step, not per stream."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from helios import telemetry
from helios.client import error_from, error_of
from helios.errors import HeliosError, UnavailableError
from helios.v1 import worker_pb2, worker_pb2_grpc

# Called with what a step gave to a sequence, as soon as it has come. What it raises ends the sequence.
Take: TypeAlias = Callable[[worker_pb2.WorkerServiceGenerateResponse], None]


class WorkerLostError(Exception):
    """A worker failed under a stream. Never leaves the gateway: the stream goes on elsewhere."""


class Attempt:
    """One stream on one worker."""

    def __init__(self, number: int, take: Take) -> None:
        self.number = number
        self._take = take
        # An error is a result, too: whoever would have raised it may be gone.
        self._end: asyncio.Future[worker_pb2.WorkerServiceGenerateResponse | Exception] = (
            asyncio.get_running_loop().create_future()
        )

    async def finish(self) -> worker_pb2.WorkerServiceGenerateResponse:
        """The finish, when the sequence has ended; by then all its tokens have been taken.

        Raises the HeliosError with which the worker ended the sequence, WorkerLostError when the pool has
        given the worker up, and what the taker of its tokens has raised.
        """
        end = await self._end
        if isinstance(end, Exception):
            raise end
        return end

    def take(self, response: worker_pb2.WorkerServiceGenerateResponse) -> None:
        """Passes on the tokens of one step, unless it has ended."""
        if self._end.done():
            return
        try:
            self._take(response)
        except Exception as error:
            # Ends this stream, whose task raises it; the call reads on for the others.
            self.end(error)

    def end(self, end: worker_pb2.WorkerServiceGenerateResponse | Exception) -> None:
        """Takes in how it ended, unless it has ended already: no more will come."""
        if not self._end.done():
            self._end.set_result(end)


class WorkerCall:
    """One GenerateMany call, open until it breaks or is closed; its streams end with it."""

    def __init__(self, stub: "worker_pb2_grpc.WorkerServiceAsyncStub", address: str) -> None:
        self._address = address
        self._numbers = itertools.count()
        self._attempts: dict[int, Attempt] = {}
        self._unsent: asyncio.Queue[worker_pb2.GenerateManyRequest | None] = asyncio.Queue()
        self._call = stub.GenerateMany(self._requests())
        self._reading = asyncio.create_task(self._read())

    @property
    def ended(self) -> bool:
        """Whether it can carry no more streams."""
        return self._reading.done()

    def start(
        self,
        request: worker_pb2.WorkerServiceGenerateRequest,
        timeout_seconds: float,
        take: Take,
    ) -> Attempt:
        """Begins a sequence, in the current trace; `take` gets its tokens."""
        attempt = Attempt(next(self._numbers), take)
        self._attempts[attempt.number] = attempt
        start = worker_pb2.SequenceStart(
            sequence=attempt.number,
            request=request,
            timeout_seconds=timeout_seconds,
            trace_context=dict(telemetry.inject()),
        )
        self._unsent.put_nowait(worker_pb2.GenerateManyRequest(start=start))
        return attempt

    def forget(self, attempt: Attempt) -> None:
        """Ends a sequence, wherever it stands."""
        if self._attempts.pop(attempt.number, None) is not None:
            self._unsent.put_nowait(worker_pb2.GenerateManyRequest(cancel=attempt.number))

    def close(self, error: Exception) -> None:
        """Ends the call; its streams get the error."""
        self._end(error)
        self._call.cancel()

    async def _requests(self) -> AsyncIterator[worker_pb2.GenerateManyRequest]:
        while (request := await self._unsent.get()) is not None:
            yield request

    async def _read(self) -> None:
        error: HeliosError = UnavailableError("it ended the call that carries its streams")
        try:
            async for response in self._call:
                for output in response.outputs:
                    self._take(output)
        except grpc.aio.AioRpcError as broken:
            error = error_from(broken, self._address)
        except DecodeError as unreadable:
            error = HeliosError(f"it sent what is no response: {unreadable}")
            self._call.cancel()
        finally:
            self._end(error)

    def _take(self, output: worker_pb2.SequenceOutput) -> None:
        attempt = self._attempts.get(output.sequence)
        # Of a sequence that was cancelled, something may still have been on its way.
        if attempt is None:
            return
        if output.HasField("status"):
            del self._attempts[output.sequence]
            attempt.end(error_of(status_pb2.Status.FromString(output.status)))
            return
        response = output.response
        if response.HasField("finish"):
            del self._attempts[output.sequence]
            attempt.end(response)
        else:
            attempt.take(response)

    def _end(self, error: Exception) -> None:
        attempts, self._attempts = self._attempts, {}
        for attempt in attempts.values():
            attempt.end(error)
        self._unsent.put_nowait(None)
