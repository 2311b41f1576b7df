"""Every error Helios raises on purpose. Each maps to one gRPC status; each message says what to do."""

import math
from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

_DOMAIN = "helios"
# Where grpc_status looks for them.
_DETAILS_KEY = "grpc-status-details-bin"


class HeliosError(Exception):
    """Root of the tree. `code` is the gRPC status that a client sees."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    @property
    def message(self) -> str:
        """The text a person reads."""
        return str(self)


class InvalidRequestError(HeliosError):
    """The request can never succeed as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class UnknownModelError(HeliosError):
    """The named model is not served, or not in the models directory."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownWorkerError(HeliosError):
    """No worker of that name is known; the message names those that are."""

    code = grpc.StatusCode.NOT_FOUND


class OverloadedError(HeliosError):
    """A limit is reached; come back after `retry_after_seconds`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(HeliosError):
    """Something the request needs is not there now; the message says what is being waited for."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(HeliosError):
    """The request's deadline passed before it ended."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(HeliosError):
    """The client cancelled the request."""

    code = grpc.StatusCode.CANCELLED


class CheckpointError(HeliosError):
    """A checkpoint is missing, corrupt or of an unsupported kind; the message names the file."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnknownDepthError(HeliosError):
    """The requested depth is not an exit layer of the model; the message names the valid ones."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class OutOfMemoryError(HeliosError):
    """The memory budget cannot hold what was asked for."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class EngineFailedError(HeliosError):
    """A worker's engine has failed, and all its sequences with it. The worker ends and must be restarted."""


class SequenceFailedError(HeliosError):
    """One sequence has failed and would fail on any worker. The engine and all others go on."""


class QuarantinedError(HeliosError):
    """Several workers failed one after the other under this request, so no other worker gets it."""


class SettingsError(HeliosError):
    """A setting is missing, contradictory or out of range."""

    code = grpc.StatusCode.FAILED_PRECONDITION


def status_of(error: HeliosError) -> status_pb2.Status:
    """An error with its machine-readable details (google.rpc.Status, AIP-193); overload has RetryInfo."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    status.details.append(_pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)))
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(_retry_milliseconds(error))
        status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def trailing_metadata(error: HeliosError) -> tuple[tuple[str, str | bytes], ...]:
    """The status of an error as gRPC carries it.

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
