"""How outputs get from the engine's thread to the calls that wait for them on the event loop."""

import asyncio
from collections import deque

from helios.engine.interface import Output


class Outbox:
    """What the engine has produced for one call and the call has not sent yet.

    Sequences have the numbers that the caller gave them. The requests' max_tokens bound what gathers here:
    the tokens of a slow caller leave in one message, so it slows only itself.
    """

    def __init__(self) -> None:
        self._outputs: list[tuple[int, Output]] = []
        self._filled = asyncio.Event()

    def put(self, sequence: int, output: Output) -> None:
        """Adds an output. On the event loop's thread."""
        self._outputs.append((sequence, output))
        self._filled.set()

    async def take(self) -> list[tuple[int, Output]]:
        """Takes everything there is, in order; waits while there is nothing."""
        await self._filled.wait()
        self._filled.clear()
        outputs, self._outputs = self._outputs, []
        return outputs


class Delivery:
    """Carries outputs from the engine's thread to the event loop, which only a step's last output wakes.

    If the first one woke it, the loop and the engine would compete for the interpreter's lock, and a busy
    machine would send a step in two parts.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outputs: deque[tuple[Outbox, int, Output]] = deque()
        self._due = False

    def send(self, outbox: Outbox, sequence: int, output: Output) -> None:
        """Sends a sequence's output to an outbox. On any thread."""
        self._outputs.append((outbox, sequence, output))
        if not (self._due or output.more):
            self._due = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Cleared first: an output that is appended from now on is either taken below or wakes the loop again.
        self._due = False
        while self._outputs:
            outbox, sequence, output = self._outputs.popleft()
            outbox.put(sequence, output)
