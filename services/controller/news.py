"""Lets one part of the controller tell a loop in another part that there is something to do."""

import asyncio
import contextlib


class News:
    """An event for one waiting loop, which also checks by itself from time to time."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Wakes the loop. If it is not waiting, its next wait ends at once."""
        self._event.set()

    async def wait(self, seconds: float) -> None:
        """Returns at the next `tell`, or after this many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()
