"""Writes responses to one client, so that a deadline can end the stream at any moment."""

import asyncio
from typing import Any

import grpc


class ResponseWriter:
    """Writes one stream's responses.

    gRPC sends the initial metadata with the first message. If a deadline interrupts that, grpc.aio sends the
    metadata again with the status. That fails, and the client waits for a status forever. So the metadata is
    sent first here, and this cannot be interrupted.
    """

    def __init__(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        self._context = context
        self._begun = False

    async def write(self, message: bytes) -> None:
        """Sends a message. Waits while the client reads too slowly."""
        if not self._begun:
            self._begun = True
            # Unlike a message, this does not wait for the client to read.
            sending = asyncio.ensure_future(self._context.send_initial_metadata(()))
            try:
                await asyncio.shield(sending)
            except asyncio.CancelledError:
                await sending
                raise
        await self._context.write(message)
