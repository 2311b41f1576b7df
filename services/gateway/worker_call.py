"""The call that carries all of a gateway's streams on one worker, with one message per step."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from helios import telemetry
from helios.client import error_from, error_of
from helios.errors import EngineFailedError
from helios.v1 import worker_pb2, worker_pb2_grpc

# Called with a step's output for a sequence as soon as it arrives. If it raises, the sequence ends.
Take: TypeAlias = Callable[[worker_pb2.WorkerServiceGenerateResponse], None]
# A stream has settled on a worker with the second message from it. The first may only repeat tokens that the
# previous worker had computed and that were lost in transit when it failed.
_SETTLED_MESSAGES = 2


class WorkerLostError(Exception):
    """A stream cannot continue at its worker. It continues elsewhere, so clients never see this error."""


class WorkerFailedError(WorkerLostError):
    """The worker was lost with all its streams: its process or its engine failed, or it does not respond."""

    def __init__(self, reason: str, *, ran: bool, settled: bool, suspects: int) -> None:
        """`ran` and `settled`: of the stream's Attempt. `suspects`: how many suspects the call had."""
        super().__init__(reason)
        self.ran = ran
        self.settled = settled
        self.suspects = suspects


class Attempt:
    """One stream on one worker."""

    def __init__(self, number: int, take: Take, *, reached: bool) -> None:
        """`reached`: whether the worker was known to be alive when the stream was sent."""
        self.number = number
        self._take = take
        self._reached = reached
        self._messages = 0
        # An error is set as a result, because an exception that nobody awaits would be logged.
        self._end: asyncio.Future[worker_pb2.WorkerServiceGenerateResponse | Exception] = (
            asyncio.get_running_loop().create_future()
        )

    async def finish(self) -> worker_pb2.WorkerServiceGenerateResponse:
        """Returns the finish or the redirect, once the sequence has ended and all its tokens have been taken.

        Raises the HeliosError with which the worker ended the sequence, WorkerLostError when the pool has
        given the worker up, and any error of `take`.
        """
        end = await self._end
        if isinstance(end, Exception):
            raise end
        return end

    @property
    def ran(self) -> bool:
        """Whether the worker may have begun to compute it."""
        return self._reached or self._messages > 0

    @property
    def settled(self) -> bool:
        """Whether the worker has computed enough of it to show that the stream does not make it fail."""
        return self._messages >= _SETTLED_MESSAGES

    def take(self, response: worker_pb2.WorkerServiceGenerateResponse) -> None:
        """Passes on the tokens of one step, unless the stream has ended."""
        if self._end.done():
            return
        self._messages += 1
        try:
            self._take(response)
        except Exception as error:
            # Ends only this stream, whose task raises the error. The call continues for the others.
            self.end(error)

    def end(self, end: worker_pb2.WorkerServiceGenerateResponse | Exception) -> None:
        """Ends it, unless it has ended already. No more output will come."""
        if not self._end.done():
            self._end.set_result(end)


class WorkerCall:
    """One GenerateMany call, open until it breaks or is closed. Its streams end with it."""

    def __init__(
        self,
        stub: "worker_pb2_grpc.WorkerServiceAsyncStub",
        address: str,
        on_acquitted: Callable[[], None],
    ) -> None:
        """`on_acquitted` is called when a suspect has settled or ended."""
        self._address = address
        self._on_acquitted = on_acquitted
        self._numbers = itertools.count()
        self._attempts: dict[int, Attempt] = {}
        self._suspects: set[Attempt] = set()
        self._ended = False
        self._unsent: asyncio.Queue[worker_pb2.GenerateManyRequest | None] = asyncio.Queue()
        self._call = stub.GenerateMany(self._requests())
        self._reading = asyncio.create_task(self._read())

    @property
    def ended(self) -> bool:
        """Whether it can carry no more streams."""
        return self._ended

    @property
    def suspects(self) -> int:
        """Number of streams under which another worker has failed and which have not settled here."""
        return len(self._suspects)

    def start(
        self,
        request: worker_pb2.WorkerServiceGenerateRequest,
        timeout_seconds: float,
        take: Take,
        *,
        suspect: bool,
        reached: bool,
    ) -> Attempt:
        """Begins a sequence in the current trace. `take` gets its tokens.

        `suspect`: whether another worker has failed under it. `reached`: whether this worker is known to be
        alive.
        """
        attempt = Attempt(next(self._numbers), take, reached=reached)
        self._attempts[attempt.number] = attempt
        if suspect:
            self._suspects.add(attempt)
        start = worker_pb2.SequenceStart(
            sequence=attempt.number,
            request=request,
            timeout_seconds=timeout_seconds,
            trace_context=dict(telemetry.inject()),
        )
        self._unsent.put_nowait(worker_pb2.GenerateManyRequest(start=start))
        return attempt

    def forget(self, attempt: Attempt) -> None:
        """Ends a sequence in any state."""
        if self._attempts.pop(attempt.number, None) is not None:
            self._unsent.put_nowait(worker_pb2.GenerateManyRequest(cancel=attempt.number))
        self._acquit(attempt)

    def close(self, reason: str) -> None:
        """Ends the call because the worker is lost. Its streams get WorkerFailedError."""
        self._end(reason)
        self._call.cancel()

    async def _requests(self) -> AsyncIterator[worker_pb2.GenerateManyRequest]:
        while (request := await self._unsent.get()) is not None:
            yield request

    async def _read(self) -> None:
        reason = "it ended the call that carries its streams"
        try:
            async for response in self._call:
                for output in response.outputs:
                    self._take(output)
        except grpc.aio.AioRpcError as broken:
            reason = f"{broken.code().name}, {error_from(broken, self._address).message}"
        except DecodeError as unreadable:
            reason = f"it sent what is not a response: {unreadable}"
            self._call.cancel()
        finally:
            self._end(reason)

    def _take(self, output: worker_pb2.SequenceOutput) -> None:
        attempt = self._attempts.get(output.sequence)
        # Output of a cancelled sequence may still arrive.
        if attempt is None:
            return
        if output.HasField("status"):
            error = error_of(status_pb2.Status.FromString(output.status))
            if isinstance(error, EngineFailedError):
                # All other streams are about to get the same status, so they are ended at once.
                self.close(error.message)
                return
            del self._attempts[output.sequence]
            attempt.end(error)
            return
        response = output.response
        if response.HasField("finish") or response.HasField("redirect"):
            del self._attempts[output.sequence]
            attempt.end(response)
        else:
            attempt.take(response)
            if attempt.settled:
                self._acquit(attempt)

    def _acquit(self, attempt: Attempt) -> None:
        if attempt in self._suspects:
            self._suspects.discard(attempt)
            self._on_acquitted()

    def _end(self, reason: str) -> None:
        self._ended = True
        attempts, self._attempts = self._attempts, {}
        for attempt in attempts.values():
            attempt.end(
                WorkerFailedError(
                    reason, ran=attempt.ran, settled=attempt.settled, suspects=len(self._suspects)
                )
            )
        self._unsent.put_nowait(None)
