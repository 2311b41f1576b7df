"""Passes outputs from the engine's thread to the calls that wait for them on the event loop."""

import asyncio
from collections import deque

from helios.engine.interface import Output


class Outbox:
    """Output that the engine has produced for one call and that the call has not sent yet.

    Sequences have the numbers that the caller gave them. The requests' max_tokens limit how much collects
    here. The tokens of a slow caller are sent in one message, so it slows only itself.
    """

    def __init__(self) -> None:
        self._outputs: list[tuple[int, Output]] = []
        self._filled = asyncio.Event()

    def put(self, sequence: int, output: Output) -> None:
        """Adds an output. Call it on the event loop's thread."""
        self._outputs.append((sequence, output))
        self._filled.set()

    async def take(self) -> list[tuple[int, Output]]:
        """Takes all outputs in order. Waits while there are none."""
        await self._filled.wait()
        self._filled.clear()
        outputs, self._outputs = self._outputs, []
        return outputs


class Delivery:
    """Passes outputs from the engine's thread to the event loop. Only a step's last output wakes the loop.

    If the first one woke it, the loop and the engine would compete for the GIL, and on a busy machine a step
    would be sent in two parts.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outputs: deque[tuple[Outbox, int, Output]] = deque()
        self._due = False

    def send(self, outbox: Outbox, sequence: int, output: Output) -> None:
        """Sends a sequence's output to an outbox. Call it on any thread."""
        self._outputs.append((outbox, sequence, output))
        if not (self._due or output.more):
            self._due = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Cleared first, so that an output appended from now on is either taken below or wakes the loop again.
        self._due = False
        while self._outputs:
            outbox, sequence, output = self._outputs.popleft()
            outbox.put(sequence, output)
