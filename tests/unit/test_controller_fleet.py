"""How the controller sees a worker. A scripted worker sends the telemetry."""

from helios.registry import WorkerLease
from helios.v1 import worker_pb2
from services.controller.fleet import Worker
from services.controller.settings import ControllerSettings
from tests.scripted_worker import scripted_workers, well_behaved


async def test_unsure_tokens_of_the_plan_before_are_no_breach_of_the_next() -> None:
    async with scripted_workers(well_behaved) as (scripted,):
        worker = Worker(WorkerLease(worker_id="a", address=scripted.address), ControllerSettings())

        async def window_after(depth: int, generated: int, unsure: int) -> tuple[int, int]:
            told = worker_pb2.Telemetry(
                worker_id="a", model="tiny", depth=depth, generated_tokens=generated, high_exit_tokens=unsure
            )
            scripted.telemetry = told
            await worker.take(told)
            return worker.window.tokens, worker.window.high_exit_tokens

        try:
            assert await window_after(4, 0, 0) == (0, 0)
            assert await window_after(4, 100, 60) == (100, 60)
            # The tokens since the last message may belong to either plan, so they do not count.
            assert await window_after(3, 150, 105) == (0, 0)
            assert await window_after(3, 170, 106) == (20, 1)
        finally:
            await worker.channel.close()
