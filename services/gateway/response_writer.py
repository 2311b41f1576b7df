"""Responses to one client, such that a deadline can end the stream at any moment."""

import asyncio
from typing import Any

import grpc


class ResponseWriter:
    """Writes one stream's responses.

    gRPC sends the initial metadata with the first message. When a deadline interrupts that, grpc.aio sends
    them again with the status, which fails, and the client waits for a status for ever. So here they go
    first, and are not interrupted.
    """

    def __init__(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        self._context = context
        self._begun = False

    async def write(self, message: bytes) -> None:
        """Sends a message; waits while the client is behind."""
        if not self._begun:
            self._begun = True
            # They do not wait for the client to read, as a message may.
            sending = asyncio.ensure_future(self._context.send_initial_metadata(()))
            try:
                await asyncio.shield(sending)
            except asyncio.CancelledError:
                await sending
                raise
        await self._context.write(message)
