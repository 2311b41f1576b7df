"""The client library streams tokens from a gateway, for programs and for the `helios` command.

    with Client("127.0.0.1:50051") as client:
        for event in client.generate(generate_request("Once upon a time")):
            ...

Events are `Token` messages and at the end one `Finish` (protos/helios/v1/generation.proto). Every failure is
an error of helios/errors.py. An OverloadedError says when to retry.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from helios import channel, errors
from helios.errors import HeliosError, InvalidRequestError, OverloadedError
from helios.slo import Objective
from helios.v1 import generation_pb2, inference_pb2, inference_pb2_grpc

Event = generation_pb2.Token | generation_pb2.Finish

_STATUS_DETAILS_KEY = "grpc-status-details-bin"
_DEFAULT_RETRY_SECONDS = 1.0
_ERRORS_BY_CODE: dict[int, type[HeliosError]] = {
    error.code.value[0]: error
    for error in (
        errors.InvalidRequestError,
        errors.UnknownModelError,
        errors.UnavailableError,
        errors.DeadlineExceededError,
        errors.CancelledError,
    )
}


def generate_request(
    prompt: str | Sequence[int] | inference_pb2.ChatMessages,
    *,
    model: str = "",
    request_id: str = "",
    sampling: generation_pb2.SamplingParams | None = None,
    max_perplexity_increase: float | None = None,
    objective: Objective | None = None,
) -> inference_pb2.GenerateRequest:
    """A request for a text, for token ids or for a conversation. Unset fields get the gateway's defaults.

    max_perplexity_increase: a share (0.05 is 5 %).
    """
    request = inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=sampling,
        max_perplexity_increase=max_perplexity_increase,
    )
    if objective is not None:
        request.objective = objective.to_proto()
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, inference_pb2.ChatMessages):
        request.messages.CopyFrom(prompt)
    else:
        request.token_ids.CopyFrom(generation_pb2.TokenIds(ids=prompt))
    return request


class Client:
    """A connection to a gateway for threads and scripts."""

    def __init__(self, target: str) -> None:
        """Connects to host:port on first use."""
        self._target = target
        self._channel = channel.from_client(target)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(
        self, request: inference_pb2.GenerateRequest, timeout_seconds: float | None = None
    ) -> Iterator[Event]:
        """Yields the tokens as they come, then the finish. Leaving the loop cancels the request.

        Raises a HeliosError for every status but OK.
        """
        call = self._stub.Generate(request, timeout=timeout_seconds)
        try:
            for response in call:
                yield from _events(response)
        except grpc.RpcError as error:
            raise error_from(error, self._target) from error
        finally:
            call.cancel()

    def status(self, timeout_seconds: float | None = None) -> inference_pb2.GetServingStatusResponse:
        """The current models, workers and load. Raises a HeliosError for every status but OK."""
        try:
            return self._stub.GetServingStatus(
                inference_pb2.GetServingStatusRequest(), timeout=timeout_seconds
            )
        except grpc.RpcError as error:
            raise error_from(error, self._target) from error

    def close(self) -> None:
        """Closes the connection and cancels its open streams."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient:
    """A connection to a gateway for asyncio programs."""

    def __init__(self, target: str) -> None:
        """Connects to host:port on first use. Must be made in the event loop that uses it."""
        self._target = target
        self._channel = channel.from_client_async(target)
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._channel
        )

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_seconds: float | None = None
    ) -> AsyncIterator[Event]:
        """Yields the tokens as they come, then the finish. Closing the iterator cancels the request.

        Raises a HeliosError for every status but OK.
        """
        call = self._stub.Generate(request, timeout=timeout_seconds)
        try:
            async for response in call:
                for event in _events(response):
                    yield event
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._target) from error
        finally:
            call.cancel()

    async def status(self, timeout_seconds: float | None = None) -> inference_pb2.GetServingStatusResponse:
        """The current models, workers and load. Raises a HeliosError for every status but OK."""
        try:
            return await self._stub.GetServingStatus(
                inference_pb2.GetServingStatusRequest(), timeout=timeout_seconds
            )
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._target) from error

    async def close(self) -> None:
        """Closes the connection and cancels its open streams."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def error_from(rpc_error: grpc.RpcError, target: str) -> HeliosError:
    """The error for the status of a call to `target` (host:port). The inverse of server.abort."""
    code, message = rpc_error.code(), rpc_error.details() or rpc_error.code().name
    status = _rich_status(rpc_error)
    if code is grpc.StatusCode.UNAVAILABLE and not status.details:
        # The status comes from gRPC itself: no server listens there, or the connection broke.
        message = f"{target} does not answer ({message}); is it running?"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not status.details and "larger than max" in message:
        # gRPC's own message too. A retry would not help.
        return InvalidRequestError(f"the request is larger than {target} takes: {message}")
    return error_of(status_pb2.Status(code=code.value[0], message=message, details=status.details))


def error_of(status: status_pb2.Status) -> HeliosError:
    """The error that a status represents. The inverse of errors.status_of.

    A status that Helios did not create becomes the Helios error with the same code, or else HeliosError.
    """
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        # Each detail is tried as both types. Unpack ignores the wrong type.
        detail.Unpack(info)
        detail.Unpack(retry)
    if status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] and info.reason != "OutOfMemoryError":
        seconds = retry.retry_delay.ToTimedelta().total_seconds()
        return OverloadedError(status.message, seconds or _DEFAULT_RETRY_SECONDS)
    named = getattr(errors, info.reason, None) if info.reason else None
    if isinstance(named, type) and issubclass(named, HeliosError) and named.code.value[0] == status.code:
        return named(status.message)
    return _ERRORS_BY_CODE.get(status.code, HeliosError)(status.message)


def _rich_status(rpc_error: grpc.RpcError) -> status_pb2.Status:
    # These are pairs at run time, although the stubs say otherwise.
    metadata = cast(Iterable[tuple[str, str | bytes]], rpc_error.trailing_metadata() or ())
    for key, value in metadata:
        if key == _STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break  # Not written by Helios. The code and the message are still valid.
    return status_pb2.Status()


def _events(response: inference_pb2.GenerateResponse) -> Iterator[Event]:
    if response.HasField("finish"):
        yield response.finish
    else:
        yield from response.chunk.tokens
