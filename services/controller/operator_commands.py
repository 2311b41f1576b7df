"""The operator's commands: change the SLO, and pin workers to a plan."""

from collections.abc import Awaitable, Callable

from helios.errors import InvalidRequestError, UnavailableError, UnknownWorkerError
from helios.orders import EVERY_WORKER
from helios.served import ServedPlan
from helios.slo import Slo
from services.controller.fleet import Fleet, Worker
from services.controller.replica import Replica
from services.controller.rollout import Rollout
from services.controller.situation import Trigger


class OperatorCommands:
    """Changes the leader's state and applies it to the fleet. Each command raises if it has no effect."""

    def __init__(
        self,
        replica: Replica,
        fleet: Fleet,
        rollout: Rollout,
        contradiction: Callable[[Slo], str | None],
        decide: Callable[[Trigger], Awaitable[None]],
    ) -> None:
        """contradiction: why nothing can satisfy an SLO. decide: called after a command made a change."""
        self._replica = replica
        self._fleet = fleet
        self._rollout = rollout
        self._contradiction = contradiction
        self._decide = decide

    async def set_slo(self, slo: Slo) -> None:
        """Changes the SLO and decides again.

        Raises InvalidRequestError naming bounds that contradict each other, UnavailableError when this
        replica cannot act.
        """
        await self._replica.check_leading()
        if (why := self._contradiction(slo)) is not None:
            raise InvalidRequestError(why)
        await self._replica.change(slo=slo)
        await self._decide(Trigger.SLO)

    async def pin(self, plan: ServedPlan, worker_id: str) -> None:
        """Moves one worker, or all, to a plan and holds it there. Returns when it is served.

        `worker_id` may be EVERY_WORKER. Raises UnknownWorkerError, UnknownModelError, UnknownDepthError and
        any other refusal of a worker; UnavailableError when this replica cannot act or a worker is lost
        during the move.
        """
        await self._replica.check_leading()
        targets = self._targets(worker_id)
        async with self._rollout.paused():
            for worker in targets:
                await self._rollout.bring(worker, plan)
            others = {} if worker_id == EVERY_WORKER else self._replica.state.pins
            await self._replica.change(pins={**others, worker_id: plan})
        self._rollout.begin()
        await self._decide(Trigger.OPERATOR)

    async def unpin(self, worker_id: str) -> None:
        """Returns one worker, or all, to the policy.

        `worker_id` may be EVERY_WORKER. Raises UnknownWorkerError, UnavailableError when this replica cannot
        act.
        """
        await self._replica.check_leading()
        pins: dict[str, ServedPlan] = {}
        if worker_id != EVERY_WORKER:
            pins = dict(self._replica.state.pins)
            if worker_id not in pins:
                self._targets(worker_id)
            held = pins.pop(EVERY_WORKER, None)
            if held is not None:
                # All other workers stay pinned.
                pins = {worker.worker_id: held for worker in self._fleet.workers} | pins
            pins.pop(worker_id, None)
        await self._replica.change(pins=pins)
        self._rollout.begin()
        await self._decide(Trigger.OPERATOR)

    def _targets(self, worker_id: str) -> list[Worker]:
        """The workers that a command names. Raises UnknownWorkerError, UnavailableError when none serves."""
        if worker_id == EVERY_WORKER:
            if not self._fleet.serving:
                raise UnavailableError("no worker serves; start one")
            return self._fleet.serving
        worker = self._fleet.find(worker_id)
        if worker is None:
            names = ", ".join(worker.worker_id for worker in self._fleet.workers) or "none"
            raise UnknownWorkerError(f"no worker {worker_id!r}; known: {names}")
        if not worker.is_serving:
            raise UnavailableError(f"worker {worker_id} does not serve at the moment; try again when it does")
        return [worker]
