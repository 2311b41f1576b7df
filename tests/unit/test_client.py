"""The client library raises the error that the server raised."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from helios import errors
from helios.client import AsyncClient, generate_request
from helios.errors import HeliosError, OverloadedError
from helios.server import abort

KINDS = sorted(
    (
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, HeliosError) and kind is not OverloadedError
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("error", [*(kind("what to do") for kind in KINDS), OverloadedError("full", 2.5)])
async def test_an_error_arrives_as_it_was_raised(error: HeliosError) -> None:
    async def refuse(request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[bytes]:
        await abort(context, error)
        yield b""

    with pytest.raises(HeliosError) as caught:
        await _call(refuse)
    assert type(caught.value) is type(error)
    assert caught.value.message == error.message
    if isinstance(error, OverloadedError):
        assert isinstance(caught.value, OverloadedError)
        assert caught.value.retry_after_seconds == 2.5


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.UNIMPLEMENTED, HeliosError),
    ],
)
async def test_a_status_of_another_making_becomes_the_error_of_its_code(
    code: grpc.StatusCode, kind: type[HeliosError]
) -> None:
    async def refuse(request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[bytes]:
        await context.abort(code, "proxy says no", (("grpc-status-details-bin", b"\xff not ours"),))
        yield b""

    with pytest.raises(HeliosError, match="proxy says no") as caught:
        await _call(refuse)
    assert type(caught.value) is kind


async def _call(behaviour: Any) -> None:
    """Calls Generate on a server with this behaviour."""
    server = grpc.aio.server()
    handlers = {"Generate": grpc.unary_stream_rpc_method_handler(behaviour)}
    handler = grpc.method_handlers_generic_handler("helios.v1.InferenceService", handlers)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            async for _ in client.generate(generate_request("a")):
                pass
    finally:
        await server.stop(None)
