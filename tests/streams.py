"""Collects the messages of a stream as a client sees them, and waits for conditions with a deadline."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from helios.client import AsyncClient
from helios.v1 import generation_pb2, inference_pb2


@dataclass(frozen=True)
class Streamed:
    """All tokens of a stream, and its finish."""

    tokens: list[generation_pb2.Token]
    finish: generation_pb2.Finish

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def text(self) -> str:
        """The concatenated deltas."""
        return "".join(token.text for token in self.tokens)

    @property
    def said(self) -> tuple[list[int], list[str], "generation_pb2.FinishReason.ValueType"]:
        """The parts that must be the same in every run: ids, deltas and the reason of the end.

        The last digits of logprobs may differ, because products depend on the shape of the batch.
        """
        return self.ids, [token.text for token in self.tokens], self.finish.reason

    def check(self) -> None:
        """Checks that no index is repeated or skipped, and that the deltas are the text."""
        assert [token.index for token in self.tokens] == list(range(len(self.tokens)))
        assert self.finish.completion_tokens == len(self.tokens)
        assert self.finish.text == self.text


async def stream(
    client: AsyncClient,
    request: inference_pb2.GenerateRequest,
    on_token: Callable[[generation_pb2.Token], None] = lambda token: None,
    timeout_seconds: float = 120,
) -> Streamed:
    """Runs a request to its end and checks what holds for every stream."""
    tokens: list[generation_pb2.Token] = []
    async for event in client.generate(request, timeout_seconds):
        if isinstance(event, generation_pb2.Finish):
            whole = Streamed(tokens, event)
            whole.check()
            return whole
        tokens.append(event)
        on_token(event)
    raise AssertionError("the stream ended without a finish")


async def all_free(client: AsyncClient) -> bool:
    """Whether no stream is open and every worker's KV blocks are free."""
    status = await client.status()
    return status.open_streams == 0 and all(
        worker.telemetry.running + worker.telemetry.waiting == 0
        and worker.telemetry.blocks_free == worker.telemetry.blocks_total > 0
        for worker in status.workers
    )


async def until(
    condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 60, interval: float = 0.05
) -> None:
    """Waits until the condition holds. When the time is over, it fails and says what it waited for."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"waited {seconds} s for: {what}")
        await asyncio.sleep(interval)
