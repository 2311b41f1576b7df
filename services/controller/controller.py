"""The loop around the policy: watch, decide, record, roll out (arXiv 2504.10724)."""

import asyncio
import logging
import time
from collections import Counter

from redis.asyncio import Redis
from redis.exceptions import RedisError

from helios.errors import HeliosError
from helios.redis_outage import reason
from helios.served import ServedPlan
from helios.slo import Slo
from services.controller.agenda import Agenda, Decide, Evaluate, Outlook
from services.controller.allowance import Allowance
from services.controller.assessment import Assessor
from services.controller.candidates import Candidates
from services.controller.decision import WorkerPlan
from services.controller.decision_maker import DecisionMaker
from services.controller.fleet import Fleet, Worker
from services.controller.history import History
from services.controller.leader import Leadership
from services.controller.metrics import observe_fleet, observe_router
from services.controller.operator_commands import OperatorCommands
from services.controller.reload import WorkerLostError
from services.controller.replica import Replica
from services.controller.rollout import Plans, Rollout
from services.controller.routing.request_routing import RequestRouting
from services.controller.settings import ControllerSettings
from services.controller.situation import Bar, Trigger
from services.controller.workload import Workload

log = logging.getLogger(__name__)


class Controller:
    """Decides for a fleet while this replica leads.

    It connects the parts: `fleet` and `history` hold the known facts, the agenda says what is due,
    `decisions` asks the policy, `rollout` moves the workers, `routing` learns a router and gives it to them,
    and `operator` handles commands.
    """

    def __init__(self, redis: Redis, settings: ControllerSettings, leadership: Leadership) -> None:
        self._settings = settings
        self._fleet = Fleet(redis, settings)
        self._history = History(redis, self._fleet)
        self._candidates = Candidates(
            settings.models_dir, settings.top_k, settings.context_tokens, self._fleet
        )
        self._allowance = Allowance(settings.profiling_share)
        self._agenda = Agenda(settings, self._allowance)
        self.replica = Replica(redis, leadership, settings, on_lead=self._begin_anew)
        self._assessor = Assessor(settings, candidates=self._names, on_end=self._fleet.news.tell)
        self._rollout = Rollout(settings, self._fleet, self.replica, self._history, on_halt=self._answer_halt)
        workload = Workload(settings.prompt_tokens, settings.output_tokens)
        self.routing = RequestRouting(
            redis,
            settings,
            leadership,
            self.replica,
            self._fleet,
            self._history,
            self._candidates,
            workload,
        )
        self._decisions = DecisionMaker(
            settings,
            leadership,
            self.replica,
            self._fleet,
            self._history,
            self._rollout,
            self._candidates,
            self.routing,
            workload,
        )
        self._deciding = asyncio.Lock()
        self.operator = OperatorCommands(
            self.replica,
            self._fleet,
            self._rollout,
            contradiction=self._contradiction,
            decide=self._decide_for_operator,
        )
        # The count of finished requests at the last decision on what the router needs.
        self._routing_decided_at = 0
        # Why no decision is possible at the moment. Empty if one is.
        self._problem = ""
        observe_fleet(self._fleet, leadership)
        observe_router(self.routing)

    # -- lifetime ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Watches, and leads when no other replica does, until cancelled. Otherwise only a fault ends it."""
        async with asyncio.TaskGroup() as tasks:
            for loop in (self._fleet.run(), self.replica.run(), self._watch(), self._rollout.run()):
                tasks.create_task(loop)

    async def close(self) -> None:
        """Call it after `run`. Gives up the lock. Running reloads end by themselves."""
        await self._assessor.close()
        await self.routing.close()
        await self._fleet.close()
        await self.replica.resign()

    def _begin_anew(self) -> None:
        """Called when this replica begins to lead: what it saw while another one led may be outdated."""
        self._allowance = Allowance(self._settings.profiling_share)
        self._agenda = Agenda(self._settings, self._allowance)
        self.routing.begin_anew(self._allowance)
        self._fleet.take_served()
        self._fleet.take_prompts()

    # -- reports ----------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Messages about current problems."""
        found = [
            *self._fleet.problems(),
            *self.replica.problems(),
            self._problem,
            self._assessor.problem,
            *self._history.problems,
            *self.routing.problems(),
            self._rollout.progress.halted,
        ]
        return [problem for problem in found if problem]

    def plans(self) -> list[WorkerPlan]:
        """The plans of each worker, its first one first."""
        return [
            WorkerPlan(
                worker_id=worker.worker_id,
                model=plan.model,
                depth=plan.depth,
                pinned=self._is_pinned(worker),
            )
            for worker in self._fleet.workers
            for plan in worker.plans
        ]

    def next_assessment(self) -> str:
        """When the candidates are evaluated again, as text. Empty without a profiler."""
        if not self._assessor.has_profiler or self._settings.mode == "off" or not self._fleet.is_settled:
            return ""
        if self.routing.is_in_force and not self._assessor.is_evaluating:
            return self.routing.next_evaluation(self._fleet.totals.finished)
        return self._agenda.next_evaluation(self._outlook())

    # -- watching ---------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Checks whether there is something to do, as often as telemetry comes."""
        history_due = 0.0
        while True:
            try:
                now = time.monotonic()
                if now >= history_due:
                    history_due = now + self._settings.discovery_seconds
                    await self._history.read()
                if self.replica.is_leading and self._settings.mode != "off" and self._fleet.is_settled:
                    await self._look()
            except (RedisError, OSError, HeliosError) as error:
                self._problem = f"no decision can be made, the last plan stays: {reason(error)}"
            else:
                self._problem = ""
            await self._fleet.news.wait(self._settings.telemetry_seconds)

    async def _look(self) -> None:
        """Takes in recent events, and does what is due."""
        finished = self._fleet.totals.finished
        await self._decisions.record_outcome_when_due()
        self._observe_traffic()
        await self._take_evaluation()
        outlook = self._outlook(finished)
        for_router = self._evaluation_for_router(finished)
        match self._agenda.due(outlook):
            case Evaluate() as due if self._assessor.has_profiler and (for_router is None or due.fresh):
                if due.fresh:
                    self.routing.traffic_changed()
                self._agenda.evaluation_began(due, self._outlook())
                self._assessor.begin(due, is_history_empty=not self._history.profiles)
            case Decide(trigger, bar):
                await self._decide(trigger, bar)
            case _ if for_router is not None:
                self.routing.evaluation_began(finished)
                self._assessor.begin(for_router, is_history_empty=False)
        await self._route(finished)

    def _evaluation_for_router(self, finished: int) -> Evaluate | None:
        """The evaluation for the router that is due and may begin now."""
        may = self._assessor.has_profiler and not self._assessor.is_evaluating and self._history.profiles
        # Not while workers move, because it would take CPU from their loading.
        return self.routing.evaluation_due(finished) if may and not self._rollout.is_moving else None

    async def _route(self, finished: int) -> None:
        """Keeps the router up to date, and decides whether workers have the plans that it needs."""
        every = self._settings.reassess_requests
        if self._agenda.has_begun and not self._rollout.is_moving and self.routing.is_due(finished, every):
            await self.routing.look(finished)
            is_report_due = self.routing.is_in_force and finished >= self._routing_decided_at + every
            changes, held_up = await self._decisions.preview_routing(self._agenda)
            if held_up is not None:
                self.routing.look_again(finished + held_up)
            if changes or is_report_due:
                self._routing_decided_at = finished
                await self._decide(Trigger.ROUTING)
        await self.routing.step()

    def _observe_traffic(self) -> None:
        """Tells the agenda what was served under the plan in force."""
        in_force = self._in_force()
        for served in self._fleet.take_served():
            # The policy is not responsible for pinned workers, nor for workers that have not moved yet.
            if served.plan == in_force:
                self._agenda.observe(served, self._history.profiles, time.monotonic())

    async def _take_evaluation(self) -> None:
        """Tells the agenda about an evaluation that has ended, and reads its results."""
        ended = self._assessor.take_ended()
        if ended is not None and ended.for_router:
            await self.routing.evaluation_ended(ended.cpu_seconds, failed=bool(ended.problem))
        elif ended is not None:
            self._agenda.evaluation_ended(ended.cpu_seconds, self._fleet.threads, failed=bool(ended.problem))
            await self._history.read()

    def _in_force(self) -> ServedPlan | None:
        """The plan chosen by the policy. If the policy only advises, the plan that most workers serve."""
        if self._settings.mode == "active" and self.replica.state.plan is not None:
            return self.replica.state.plan
        served = Counter(worker.plan for worker in self._fleet.serving)
        return served.most_common(1)[0][0] if served else None

    def _outlook(self, finished: int | None = None) -> Outlook:
        """The input of the agenda. `finished`: number of requests to report; None: all."""
        return Outlook(
            now=time.monotonic(),
            finished=self._fleet.totals.finished if finished is None else finished,
            workers=[
                worker.view(pinned=False) for worker in self._fleet.serving if not self._is_pinned(worker)
            ],
            history=self._history.profiles,
            history_times=self._history.times,
            can_evaluate=self._assessor.has_profiler,
            evaluating=self._assessor.is_evaluating,
            moving=self._rollout.is_moving,
            routed=self.routing.is_in_force,
        )

    def _is_pinned(self, worker: Worker) -> bool:
        return self.replica.state.pin_of(worker.worker_id) is not None

    async def _names(self) -> tuple[str, ...]:
        return await self._candidates.names(self.replica.state.slo.objective)

    # -- deciding ---------------------------------------------------------------------------------

    async def _decide(self, trigger: Trigger, bar: Bar | None = None) -> None:
        """Makes one decision and acts on it. Raises the errors of DecisionMaker.make."""
        async with self._deciding:
            if trigger is not Trigger.ROUTING:
                await self.routing.look(self._fleet.totals.finished)
            decision = await self._decisions.make(trigger, bar, self._agenda)
            # A decision that keeps the plan does not change the urgency of the rollout.
            self._rollout.begin(urgent=decision.urgent if decision.moves else self._rollout.progress.urgent)
            self._agenda.decided(trigger, decision, self._outlook())

    async def _decide_for_operator(self, trigger: Trigger) -> None:
        if self._settings.mode != "off":
            await self._decide(trigger)

    def _contradiction(self, slo: Slo) -> str | None:
        return self._decisions.contradiction(slo, self._agenda)

    async def _answer_halt(self, worker: Worker, plans: Plans, error: HeliosError) -> None:
        """Records a halt. Bars a plan, or a set, that a worker refused, and looks for another one."""
        try:
            await self._decisions.record_outcome(is_final=False)
            if isinstance(error, WorkerLostError) or self._is_pinned(worker):
                return
            bar, first = None, plans[0]
            if len(plans) > 1:
                self.routing.refuse(plans)
            else:
                why = f"{worker.worker_id} could not load it: {error.message}"
                bar = Bar(model=first.model, depth=first.depth, time=time.time(), reason=why)
            await self._decide(Trigger.FAILURE, bar)
            if self.replica.state.wanted_plans(worker.worker_id) == plans:
                self._rollout.progress.halt(worker, plans, error)
        except (RedisError, OSError, HeliosError) as unrecorded:
            log.warning("the halt could not be recorded: %s", unrecorded)
