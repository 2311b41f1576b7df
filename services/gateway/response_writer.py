"""Responses to one client, such that a deadline can end the stream at any moment."""

import asyncio
from typing import Any

import grpc


class ResponseWriter:
    """Writes one stream's responses.

    gRPC sends the initial metadata with the first message. When a deadline interrupts that, grpc.aio sends
    them again with the status. That fails, and the client waits for a status for ever. So they are sent first
    here, and that is not interrupted.
    """

    def __init__(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        self._context = context
        self._begun = False

    async def write(self, message: bytes) -> None:
        """Sends a message; waits while the client is behind."""
        if not self._begun:
            self._begun = True
            # Unlike a message, they do not wait for the client to read.
            sending = asyncio.ensure_future(self._context.send_initial_metadata(()))
            try:
                await asyncio.shield(sending)
            except asyncio.CancelledError:
                await sending
                raise
        await self._context.write(message)
