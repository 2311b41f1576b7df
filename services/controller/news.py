"""Word from one part of the controller to the loop of another that there is something to look at."""

import asyncio
import contextlib


class News:
    """An event for one waiting loop, which also looks by itself from time to time."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Wakes the loop, or keeps it from waiting next time."""
        self._event.set()

    async def wait(self, seconds: float) -> None:
        """Returns at the next news, and after these seconds at the latest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()
