"""Makes decisions: gathers the situation, asks the policy, and records both."""

import logging
import time

from helios import telemetry
from helios.slo import Slo
from services.controller import record
from services.controller.agenda import Agenda
from services.controller.candidates import Candidates
from services.controller.decision import Decision
from services.controller.fleet import Fleet
from services.controller.history import History
from services.controller.leader import Leadership
from services.controller.measurement import Measurement
from services.controller.metrics import decision_counter
from services.controller.policy.decide import contradiction, decide
from services.controller.policy.sets import Sets
from services.controller.record import DecisionEntry
from services.controller.replica import Replica
from services.controller.rollout import Rollout
from services.controller.routing.request_routing import RequestRouting
from services.controller.settings import ControllerSettings
from services.controller.situation import Bar, Situation, Trigger
from services.controller.workload import Workload

log = logging.getLogger(__name__)


class DecisionMaker:
    """Makes one decision after the other, and measures the outcome of each."""

    def __init__(
        self,
        settings: ControllerSettings,
        leadership: Leadership,
        replica: Replica,
        fleet: Fleet,
        history: History,
        rollout: Rollout,
        candidates: Candidates,
        routing: RequestRouting,
        workload: Workload,
    ) -> None:
        self._settings = settings
        self._policy = settings.policy
        self._leadership = leadership
        self._replica = replica
        self._fleet = fleet
        self._history = history
        self._rollout = rollout
        self._candidates = candidates
        self._routing = routing
        self._workload = workload
        # Measures the last decision until its outcome is recorded.
        self._measurement: Measurement | None = None
        # Count of finished requests at the last move. None: the plan has never been moved.
        self._moved_at: int | None = None
        # The sets of the last decision while the policy only advises.
        self._advised: Sets = {}
        self._counter = decision_counter()

    async def make(self, trigger: Trigger, bar: Bar | None, agenda: Agenda) -> Decision:
        """Makes one decision: records it, then puts its plan in force. `bar` keeps a plan out from now on.

        Raises StaleLeaderError, UnavailableError, redis.RedisError. Then the plan in force does not change.
        """
        await self.record_outcome()
        candidates = await self._candidates.names(self._replica.state.slo.objective)
        bars = (*self._replica.state.bars, *([bar] if bar else []))
        self._replica.note(bars=tuple(one for one in bars if self._history.upholds(one)))
        situation = self._situation(trigger, agenda, candidates)
        with telemetry.span("Decide", attributes={"helios.trigger": str(trigger)}) as span:
            decision = decide(situation, self._policy)
            number = await self._record(situation, decision)
            # Without options nothing was chosen, so the operator's plan does not become the policy's.
            if self._settings.mode == "active" and decision.options:
                await self._replica.change(plan=decision.plan, plans=decision.plans)
            self._advised = decision.plans
            span.set_attributes(
                {
                    "helios.decision": number,
                    "helios.plan": str(decision.plan),
                    "helios.moves": decision.moves,
                    "helios.reason": decision.reason,
                }
            )
        self._counter.add(1, {"helios.trigger": str(trigger)})
        log.info("decision %d (%s): %s", number, trigger, decision.reason)
        self._measurement = Measurement(number, self._fleet.totals, len(self._fleet.serving))
        if decision.moves and self._settings.mode == "active":
            self._moved_at = self._fleet.totals.finished
        return decision

    async def preview_routing(self, agenda: Agenda) -> tuple[bool, int | None]:
        """Whether a decision on what the router needs now would change the sets of plans.

        Also the number of requests for which a dwell holds a change up. None: it does not. Raises
        SettingsError when the models directory cannot be read.
        """
        candidates = await self._candidates.names(self._replica.state.slo.objective)
        decision = decide(self._situation(Trigger.ROUTING, agenda, candidates), self._policy)
        return decision.plans != self._sets, decision.again_after_requests

    @property
    def _sets(self) -> Sets:
        """The sets of plans in force or, if the policy only advises, those of the last decision."""
        return self._replica.state.plans if self._settings.mode == "active" else self._advised

    def contradiction(self, slo: Slo, agenda: Agenda) -> str | None:
        """The bounds of an SLO that no profiled option satisfies together. None: some option does."""
        situation = self._situation(Trigger.SLO, agenda, tuple(sorted(self._history.profiles)))
        return contradiction(situation.model_copy(update={"slo": slo}), self._policy)

    async def record_outcome_when_due(self) -> None:
        """Records the outcome of the last decision once enough requests have been served under it."""
        measured = self._measurement
        if measured is not None and measured.requests(self._fleet.totals) >= self._policy.reassess_requests:
            await self.record_outcome()

    async def record_outcome(self, *, is_final: bool = True) -> None:
        """Appends the measurements since the last decision. If they are not final, another entry follows."""
        measured = self._measurement
        if measured is None:
            return
        if is_final:
            self._measurement = None
        done, progress = measured.since(self._fleet.totals), self._rollout.progress
        self._workload.learn(done)
        if done.generated or progress.reload_seconds or progress.halted:
            await record.append(
                self._leadership,
                measured.outcome(self._fleet.totals, progress),
                number=measured.number,
                keep=self._settings.record_entries,
            )

    async def _record(self, situation: Situation, decision: Decision) -> int:
        entry = DecisionEntry(
            time=time.time(),
            mode=self._settings.mode,
            situation=situation,
            settings=self._policy,
            decision=decision,
        )
        return await record.append(self._leadership, entry, keep=self._settings.record_entries)

    def _situation(self, trigger: Trigger, agenda: Agenda, candidates: tuple[str, ...]) -> Situation:
        state, profiles = self._replica.state, self._history.profiles
        since_move = None if self._moved_at is None else self._fleet.totals.finished - self._moved_at
        return Situation(
            trigger=trigger,
            slo=state.slo,
            history={name: profiles[name] for name in candidates if name in profiles},
            candidates=candidates,
            workers=tuple(
                worker.view(pinned=state.pin_of(worker.worker_id) is not None)
                for worker in self._fleet.serving
            ),
            plan=state.plan if self._settings.mode == "active" else None,
            plans=self._sets,
            offer=self._routing.offer,
            no_offer=self._routing.no_offer,
            reading=agenda.reading,
            bars=state.bars,
            delayed_seconds=agenda.delayed_seconds if trigger is Trigger.REASSESSMENT else 0.0,
            requests_since_move=since_move,
            prompt_tokens=self._workload.prompt_tokens,
            output_tokens=self._workload.output_tokens,
        )
