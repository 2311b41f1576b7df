"""An interrupted stream gets its status, even in the middle of a write."""

import asyncio
from typing import Any

import grpc
import pytest

from helios.errors import DeadlineExceededError
from helios.server import abort
from services.gateway.response_writer import ResponseWriter


@pytest.mark.parametrize("sent_before", [0, 1, 2])
async def test_a_stream_that_is_interrupted_while_it_writes_gets_its_status(sent_before: int) -> None:
    async def handle(request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        writer = ResponseWriter(context)
        for _ in range(sent_before):
            await writer.write(b"whole")
        try:
            # This timeout expires as soon as the write has begun.
            async with asyncio.timeout(0):
                await writer.write(b"interrupted")
        except TimeoutError:
            await abort(context, DeadlineExceededError("too late"))

    server = grpc.aio.server()
    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(handle)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Writer", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    received = []
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="too late"):
                async for message in channel.unary_stream("/test.Writer/Stream")(b"", timeout=60):
                    received.append(message)
    finally:
        await server.stop(None)
    assert received[:sent_before] == [b"whole"] * sent_before
