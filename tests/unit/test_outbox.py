"""All outputs of a step reach the waiting calls together."""

import asyncio

from helios.engine import Finish, FinishReason, GeneratedToken, Output
from services.worker.outbox import Delivery, Outbox


def token(index: int, more: bool) -> Output:
    generated = GeneratedToken(index, 100 + index, "x", logprob=-1.0, confidence=0.5, exit_layer=4, model="m")
    return Output(tokens=(generated,), more=more)


async def test_only_the_last_output_of_a_step_wakes_the_event_loop() -> None:
    delivery, outbox = Delivery(), Outbox()
    taken = asyncio.create_task(outbox.take())
    first, last = token(0, more=True), token(0, more=False)
    await asyncio.to_thread(delivery.send, outbox, 1, first)
    # Callbacks run in order, so everything that the thread scheduled has run before this one.
    reached = asyncio.Event()
    asyncio.get_running_loop().call_soon(reached.set)
    await reached.wait()
    assert not taken.done()
    await asyncio.to_thread(delivery.send, outbox, 2, last)
    assert await taken == [(1, first), (2, last)]


async def test_an_output_outside_of_a_step_waits_for_no_other() -> None:
    delivery, outbox = Delivery(), Outbox()
    end = Output(finish=Finish(FinishReason.LENGTH, "", prompt_tokens=2, completion_tokens=0))
    await asyncio.to_thread(delivery.send, outbox, 1, end)
    assert await outbox.take() == [(1, end)]
