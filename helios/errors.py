"""All errors that Helios raises on purpose. Each has one gRPC status, and its message says what to do."""

import math
from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

_DOMAIN = "helios"
# The metadata key in which grpc_status looks for the details.
_DETAILS_KEY = "grpc-status-details-bin"


class HeliosError(Exception):
    """Base class of all Helios errors. `code` is the gRPC status that a client sees."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    @property
    def message(self) -> str:
        """The text for people."""
        return str(self)


class InvalidRequestError(HeliosError):
    """The request can never succeed unchanged."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class UnknownModelError(HeliosError):
    """The named model is not served, or not in the models directory."""

    code = grpc.StatusCode.NOT_FOUND


class PlanNotServedError(HeliosError):
    """The plan is not in force where the request arrived. Another worker may serve it."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownWorkerError(HeliosError):
    """No worker with this name is known. The message names the known ones."""

    code = grpc.StatusCode.NOT_FOUND


class OverloadedError(HeliosError):
    """A limit is reached. Retry after `retry_after_seconds`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(HeliosError):
    """Something that the request needs is not available now. The message says what."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(HeliosError):
    """The request's deadline passed before it ended."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(HeliosError):
    """The client cancelled the request."""

    code = grpc.StatusCode.CANCELLED


class CheckpointError(HeliosError):
    """A checkpoint is missing, corrupt or not supported. The message names the file."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnknownDepthError(HeliosError):
    """The requested depth is not an exit layer of the model. The message names the valid depths."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class OutOfMemoryError(HeliosError):
    """The memory budget is too small for the request."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class EngineFailedError(HeliosError):
    """A worker's engine has failed, with all its sequences. The worker ends and must be restarted."""


class SequenceFailedError(HeliosError):
    """One sequence has failed and would fail on any worker. The engine and all other sequences continue."""


class QuarantinedError(HeliosError):
    """Several workers in a row failed under this request, so it gets no other worker."""


class SettingsError(HeliosError):
    """A setting is missing, contradictory or out of range."""

    code = grpc.StatusCode.FAILED_PRECONDITION


def status_of(error: HeliosError) -> status_pb2.Status:
    """An error with its machine-readable details (google.rpc.Status, AIP-193). Overload has RetryInfo."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    status.details.append(_pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)))
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(_retry_milliseconds(error))
        status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def trailing_metadata(error: HeliosError) -> tuple[tuple[str, str | bytes], ...]:
    """The status of an error in the form of gRPC trailing metadata.

    Overload also has `retry-after-ms`, for clients that read only metadata.
    """
    retry: tuple[tuple[str, str], ...] = ()
    if isinstance(error, OverloadedError):
        retry = (("retry-after-ms", str(_retry_milliseconds(error))),)
    return ((_DETAILS_KEY, status_of(error).SerializeToString()), *retry)


def _retry_milliseconds(error: OverloadedError) -> int:
    return max(1, math.ceil(error.retry_after_seconds * 1000))


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
