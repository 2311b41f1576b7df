"""The loop around the policy: watch, decide, record, roll out (arXiv 2504.10724)."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection

from redis.asyncio import Redis
from redis.exceptions import RedisError

from helios import catalog, telemetry
from helios.errors import (
    HeliosError,
    InvalidRequestError,
    UnavailableError,
    UnknownWorkerError,
)
from helios.ignored_entries import IgnoredEntries
from helios.redis_outage import RedisOutage, reason
from helios.shortlist import shortlist
from helios.slo import Slo
from services.controller import record, state
from services.controller.agenda import Agenda, Decide, Evaluate, Outlook
from services.controller.allowance import Allowance
from services.controller.assessment import Assessment, evaluate
from services.controller.decision import WorkerPlan
from services.controller.fleet import Fleet, Worker
from services.controller.history import History, read_history
from services.controller.leader import Leadership, find_leader
from services.controller.measurement import Measurement
from services.controller.metrics import decision_counter, observe_fleet
from services.controller.policy import contradiction, decide
from services.controller.record import DecisionEntry
from services.controller.rollout import Rollout, WorkerLostError, move_overlapping, next_to_move, reload
from services.controller.settings import ControllerSettings
from services.controller.situation import Bar, Plan, Situation, Trigger
from services.controller.state import EVERY_WORKER, ControllerState

log = logging.getLogger(__name__)

# Requests from which their mean length is taken over.
_ENOUGH_REQUESTS = 10
_RENEWALS_PER_LEASE = 3


class Controller:
    """Decides for a fleet while it leads; stands by while another replica does."""

    def __init__(self, redis: Redis, settings: ControllerSettings, leadership: Leadership) -> None:
        self._redis = redis
        self._settings = settings
        self._policy = settings.policy
        self._leadership = leadership
        self.fleet = Fleet(redis, settings)
        self.state = ControllerState(slo=settings.slo)
        self._history = History()
        self._ignored_profiles = IgnoredEntries(log)
        self._problems: dict[str, str] = {}
        # The term of leadership for which the state was resumed.
        self._resumed_term = 0
        self._rollout = Rollout()
        self._rollout_lock = asyncio.Lock()
        self._decide_lock = asyncio.Lock()
        # Set when a plan has been chosen, so that workers are brought to it at once.
        self._chosen = asyncio.Event()
        self._agenda = Agenda(settings, Allowance(settings.profiling_share))
        self._assessment: asyncio.Task[Assessment] | None = None
        self._moved_at: int | None = None
        self._mean_prompt = settings.prompt_tokens
        self._mean_output = settings.output_tokens
        self._measuring: Measurement | None = None
        self._catalog: list[catalog.ModelEntry] | None = None
        self._decisions = decision_counter()
        observe_fleet(self.fleet, leadership)

    async def run(self) -> None:
        """Watches, and leads when nobody else does, until cancelled. Ends only by a fault of its own."""
        async with asyncio.TaskGroup() as tasks:
            for loop in (self.fleet.run(), self._lead(), self._watch(), self._roll_out()):
                tasks.create_task(loop)

    async def close(self) -> None:
        """After `run`: the lock is given up; what is being reloaded ends by itself."""
        if self._assessment is not None:
            self._assessment.cancel()
            await asyncio.gather(self._assessment, return_exceptions=True)
        await self.fleet.close()
        try:
            await self._leadership.resign()
        except (RedisError, OSError) as error:
            log.warning("the leader's lock ends by itself: %s", reason(error))

    @property
    def is_leading(self) -> bool:
        """Whether this replica decides."""
        return self._leadership.is_held and self._resumed_term == self._leadership.terms

    def problems(self) -> list[str]:
        """What is amiss at the moment, in words."""
        silent = [
            f"{worker.worker_id} at {worker.address} does not answer"
            for worker in self.fleet.workers
            if worker.is_silent
        ]
        found = [*self.fleet.problems(), *self._problems.values(), *self._history.problems, *silent]
        return [problem for problem in (*found, self._rollout.halted) if problem]

    def plans(self) -> list[WorkerPlan]:
        """What each worker serves."""
        return [
            WorkerPlan(
                worker_id=worker.worker_id,
                model=plan.model,
                depth=plan.depth,
                pinned=self.state.pin_of(worker.worker_id) is not None,
            )
            for worker in self.fleet.workers
            if (plan := worker.plan) is not None
        ]

    async def set_slo(self, slo: Slo) -> None:
        """Changes the objective and decides anew.

        Raises InvalidRequestError naming bounds that contradict each other, UnavailableError when this
        replica cannot act.
        """
        await self._check_leading()
        async with self._decide_lock:
            situation = self._situation(Trigger.SLO).model_copy(update={"slo": slo})
            if (why := contradiction(situation, self._policy)) is not None:
                raise InvalidRequestError(why)
            await self._save(self.state.model_copy(update={"slo": slo}))
        if self._settings.mode != "off":
            await self._decide(Trigger.SLO)

    async def pin(self, plan: Plan, worker_id: str) -> None:
        """Brings one worker, or every one, to a plan and holds it there. Returns once it serves.

        Raises UnknownWorkerError, UnknownModelError, UnknownDepthError and what else a worker refuses with;
        UnavailableError when this replica cannot act or a worker is lost on the way.
        """
        await self._check_leading()
        targets = self._targets(worker_id)
        pins = dict(self.state.pins) if worker_id else {}
        async with self._rollout_lock:
            for worker in targets:
                if worker.plan != plan:
                    await reload(worker, plan, self._settings.reload_timeout_seconds, self._threshold(plan))
            await self._save(self.state.model_copy(update={"pins": pins | {worker_id: plan}}))
        self._rollout = Rollout()
        await self._decide_for_operator()

    async def unpin(self, worker_id: str) -> None:
        """Gives one worker, or every one, back to the policy.

        Raises UnknownWorkerError, UnavailableError when this replica cannot act.
        """
        await self._check_leading()
        pins = dict(self.state.pins)
        if worker_id:
            if worker_id not in pins:
                self._targets(worker_id)
            held = pins.pop(EVERY_WORKER, None)
            if held is not None:
                pins = {worker.worker_id: held for worker in self.fleet.workers} | pins
            pins.pop(worker_id, None)
        else:
            pins = {}
        await self._save(self.state.model_copy(update={"pins": pins}))
        self._rollout = Rollout()
        await self._decide_for_operator()

    def _targets(self, worker_id: str) -> list[Worker]:
        if not worker_id:
            if not self.fleet.serving:
                raise UnavailableError("no worker serves; start one")
            return self.fleet.serving
        worker = self.fleet.find(worker_id)
        if worker is None:
            names = ", ".join(worker.worker_id for worker in self.fleet.workers) or "none"
            raise UnknownWorkerError(f"no worker {worker_id!r}; known: {names}")
        if not worker.is_serving:
            raise UnavailableError(f"worker {worker_id} does not serve at the moment; try again when it does")
        return [worker]

    async def _check_leading(self) -> None:
        if self.is_leading:
            return
        try:
            leader = await find_leader(self._redis)
        except (RedisError, OSError) as error:
            raise UnavailableError(f"nothing can be changed: {reason(error)}") from error
        if leader is None or leader.controller_id == self._leadership.controller_id:
            raise UnavailableError("no controller leads at the moment; try again in a few seconds")
        raise UnavailableError(f"this controller stands by; the one at {leader.address} leads, ask it")

    async def _save(self, new: ControllerState) -> None:
        try:
            await state.save(self._leadership, new, self._settings.mode)
        except (RedisError, OSError) as error:
            raise UnavailableError(f"nothing can be changed: {reason(error)}") from error
        self.state = new

    # Leading.

    async def _lead(self) -> None:
        """Keeps the lock, or tries to get it; a new leader resumes what the last one saved."""
        outage = RedisOutage(log, "the last plan stays", "Redis takes the leader's lock again")
        while True:
            try:
                leading = await self._leadership.campaign()
                if leading and not self.is_leading:
                    await self._resume()
                elif not leading:
                    leader = await find_leader(self._redis)
                    where = f" at {leader.address}" if leader else ""
                    self._problems["leader"] = f"this controller stands by: another one{where} leads"
                    self.state = await state.load(self._redis) or self.state
                outage.over()
                self._problems.pop("redis", None)
                self._problems.pop("state", None)
            except (RedisError, OSError) as error:
                outage.failed(error)
                self._problems["redis"] = f"the last plan stays: {reason(error)}"
            except HeliosError as error:
                if self._problems.get("state") != error.message:
                    log.warning("this controller cannot lead: %s", error.message)
                self._problems["state"] = error.message
            await asyncio.sleep(self._settings.lease_seconds / _RENEWALS_PER_LEASE)

    async def _resume(self) -> None:
        saved = await state.load(self._redis)
        # If Redis is new, or has lost everything, what this replica knows is the best there is.
        self.state = saved or self.state
        # The leader before may have had another mode.
        await state.save(self._leadership, self.state, self._settings.mode)
        self._problems.pop("leader", None)
        self._agenda = Agenda(self._settings, Allowance(self._settings.profiling_share))
        # What was served while another led may be of long ago.
        self.fleet.take_served()
        self._resumed_term = self._leadership.terms
        log.info("leading with %s", self.state.model_dump_json())

    # Deciding.

    async def _watch(self) -> None:
        """Looks whether there is something to decide, as often as telemetry comes."""
        history_due = 0.0
        while True:
            try:
                now = time.monotonic()
                if now >= history_due:
                    history_due = now + self._settings.discovery_seconds
                    await self._read_history()
                if self.is_leading and self._settings.mode != "off" and self.fleet.is_settled:
                    await self._look()
            except (RedisError, OSError) as error:
                self._problems["decide"] = f"no decision can be made, the last plan stays: {reason(error)}"
            except HeliosError as error:
                self._problems["decide"] = f"no decision can be made, the last plan stays: {error}"
            else:
                self._problems.pop("decide", None)
            await _wait(self.fleet.news, self._settings.telemetry_seconds)

    async def _read_history(self) -> None:
        self._history = await read_history(self._redis, self._loadable(), self._ignored_profiles)
        self._problems["timing"] = self._mistimed()

    def _mistimed(self) -> str:
        """Which profiles' speeds were measured with other threads than workers have, in words."""
        facts = [profile.provenance for profile in self._history.profiles.values()]
        timed = {one["threads"] for one in facts if "threads" in one}
        for worker in self.fleet.serving:
            others = sorted(threads for threads in timed if threads != str(worker.threads))
            if others:
                return (
                    f"speeds were measured with {', '.join(others)} CPU thread(s), {worker.worker_id} has "
                    f"{worker.threads}; start the profiler with --timing-threads {worker.threads}"
                )
        return ""

    async def _look(self) -> None:
        finished = self.fleet.totals.finished
        measuring = self._measuring
        if measuring is not None and measuring.requests(self.fleet.totals) >= self._policy.reassess_requests:
            await self._record_outcome()
        in_force = self._in_force
        for served in self.fleet.take_served():
            # What an operator holds, or has not been moved yet, is nothing that the policy answers for.
            if served.plan == in_force:
                self._agenda.observe(served, self._history.profiles, time.monotonic())
        if self._assessment is not None and self._assessment.done():
            assessment, self._assessment = self._assessment, None
            done = assessment.result()
            self._problems["profiler"] = done.problem
            self._agenda.evaluation_ended(done.cpu_seconds, self.fleet.threads, failed=bool(done.problem))
            await self._read_history()
        due = self._agenda.due(self._outlook(finished))
        if isinstance(due, Evaluate) and self._settings.profiler is not None:
            self._evaluate(self._settings.profiler, due)
        elif isinstance(due, Decide):
            await self._decide(due.trigger, due.bar)

    @property
    def _in_force(self) -> Plan | None:
        """The plan that the policy has chosen; where it only advises, the one that most workers serve."""
        if self._settings.mode == "active" and self.state.plan is not None:
            return self.state.plan
        served = Counter(worker.plan for worker in self.fleet.serving)
        return served.most_common(1)[0][0] if served else None

    def _outlook(self, finished: int) -> Outlook:
        profiles = self._history.profiles
        return Outlook(
            now=time.monotonic(),
            finished=finished,
            workers=[
                worker.view(pinned=False)
                for worker in self.fleet.serving
                if self.state.pin_of(worker.worker_id) is None
            ],
            history=profiles,
            history_times=self._history.times,
            can_evaluate=self._settings.profiler is not None,
            evaluating=self._assessment is not None,
            moving=bool(self._rollout.halted) or self._to_move() is not None,
        )

    def next_assessment(self) -> str:
        """When the candidates are evaluated again, in words; empty without a profiler."""
        if self._settings.profiler is None or self._settings.mode == "off" or not self.fleet.is_settled:
            return ""
        return self._agenda.next_evaluation(self._outlook(self.fleet.totals.finished))

    def _evaluate(self, profiler: str, due: Evaluate) -> None:
        """Asks the profiler to evaluate candidates beside everything else."""
        self._agenda.evaluation_began(due, self._outlook(self.fleet.totals.finished))
        self._assessment = asyncio.create_task(self._ask(profiler, due))
        self._assessment.add_done_callback(lambda _: self.fleet.news.set())

    async def _ask(self, profiler: str, due: Evaluate) -> Assessment:
        # One that has just been started still imports its engine; with a history there is no need to wait.
        patience = self._settings.evaluate_timeout_seconds
        if self._history.profiles:
            patience = self._settings.worker_timeout_seconds
        candidates = await self._candidates()
        return await evaluate(
            profiler,
            [name for name in candidates if not due.models or name in due.models],
            due,
            connect_seconds=patience,
            timeout_seconds=self._settings.evaluate_timeout_seconds,
        )

    async def _candidates(self) -> tuple[str, ...]:
        """The shortlist (TopK), from offline facts; without any, every model that workers can load."""
        serving = self.fleet.serving
        loadable = self._loadable()
        if self._settings.models_dir is None or not serving:
            return tuple(sorted(loadable))
        if self._catalog is None:
            self._catalog = await asyncio.to_thread(catalog.list_models, self._settings.models_dir)
        served = serving[0].model
        tokenizers = (None, served.tokenizer_id)
        movable = [
            entry for entry in self._catalog if entry.name in loadable and entry.tokenizer_id in tokenizers
        ]
        numbers = [2 * one.config.hidden_size * served.depth for one in movable if one.name == served.name]
        chosen = shortlist(
            movable,
            self.state.slo.objective,
            min(worker.memory_bytes for worker in serving),
            served.kv_bytes_per_token // numbers[0] if numbers else 1,
            self._settings.top_k,
        )
        return tuple(entry.name for entry in chosen.candidates)

    def _loadable(self) -> frozenset[str]:
        return frozenset().union(*(worker.models for worker in self.fleet.serving))

    def _situation(self, trigger: Trigger, candidates: tuple[str, ...] | None = None) -> Situation:
        profiles = self._history.profiles
        names = tuple(sorted(profiles)) if candidates is None else candidates
        finished = self.fleet.totals.finished
        return Situation(
            trigger=trigger,
            slo=self.state.slo,
            history={name: profiles[name] for name in names if name in profiles},
            candidates=names,
            workers=tuple(
                worker.view(pinned=self.state.pin_of(worker.worker_id) is not None)
                for worker in self.fleet.serving
            ),
            plan=self.state.plan if self._settings.mode == "active" else None,
            reading=self._agenda.reading,
            bars=self.state.bars,
            delayed_seconds=self._agenda.delayed_seconds if trigger is Trigger.REASSESSMENT else 0.0,
            requests_since_move=None if self._moved_at is None else finished - self._moved_at,
            prompt_tokens=self._mean_prompt,
            output_tokens=self._mean_output,
        )

    async def _decide_for_operator(self) -> None:
        if self._settings.mode != "off":
            await self._decide(Trigger.OPERATOR)

    async def _decide(self, trigger: Trigger, bar: Bar | None = None) -> None:
        """One decision: recorded first, then made the plan in force.

        Raises StaleLeaderError, redis.RedisError; nothing has changed then.
        """
        async with self._decide_lock:
            await self._record_outcome()
            candidates = await self._candidates()
            bars = [one for one in (*self.state.bars, *([bar] if bar else [])) if self._still_holds(one)]
            self.state = self.state.model_copy(update={"bars": tuple(bars)})
            situation = self._situation(trigger, candidates)
            with telemetry.span("Decide", attributes={"helios.trigger": str(trigger)}) as span:
                decision = decide(situation, self._policy)
                entry = DecisionEntry(
                    time=time.time(),
                    mode=self._settings.mode,
                    situation=situation,
                    settings=self._policy,
                    decision=decision,
                )
                number = await record.append(self._leadership, entry, keep=self._settings.record_entries)
                # Without options nothing was chosen, and the operator's plan is not made the policy's.
                if self._settings.mode == "active" and decision.options:
                    await self._save(self.state.model_copy(update={"plan": decision.plan}))
                span.set_attributes(
                    {
                        "helios.decision": number,
                        "helios.plan": str(decision.plan),
                        "helios.moves": decision.moves,
                        "helios.reason": decision.reason,
                    }
                )
            self._decisions.add(1, {"helios.trigger": str(trigger)})
            log.info("decision %d (%s): %s", number, trigger, decision.reason)
            totals = self.fleet.totals
            self._measuring = Measurement(number, totals, len(self.fleet.serving))
            # A decision that keeps the plan leaves the way to it as it was.
            self._rollout = Rollout(urgent=decision.urgent if decision.moves else self._rollout.urgent)
            self._agenda.decided(trigger, decision, self._outlook(totals.finished))
            self._chosen.set()
            if decision.moves and self._settings.mode == "active":
                self._moved_at = totals.finished
            if decision.options:
                self._problems.pop("profile", None)

    def _still_holds(self, bar: Bar) -> bool:
        profile = self._history.profiles.get(bar.model)
        return profile is None or profile.time <= bar.time

    async def _record_outcome(self) -> None:
        """Appends what was measured since the last decision, once."""
        measuring, self._measuring = self._measuring, None
        if measuring is None:
            return
        since = measuring.since(self.fleet.totals)
        if since.finished >= _ENOUGH_REQUESTS and since.prefilled and since.generated:
            self._mean_prompt = since.prefilled / since.finished
            self._mean_output = since.generated / since.finished
        if since.generated or self._rollout.reload_seconds or self._rollout.halted:
            outcome = measuring.outcome(self.fleet.totals, self._rollout)
            keep = self._settings.record_entries
            await record.append(self._leadership, outcome, number=measuring.number, keep=keep)

    # Rolling out.

    def _wanted(self, worker_id: str) -> Plan | None:
        # Operators are obeyed in every mode.
        if self._settings.mode == "active":
            return self.state.wanted(worker_id)
        return self.state.pin_of(worker_id)

    def _to_move(self, besides: Collection[str] = ()) -> tuple[Worker, Plan] | None:
        """The worker that moves next, and where to; none of those `besides`."""
        if not self.is_leading:
            return None

        def wanted(worker_id: str) -> Plan | None:
            return None if worker_id in besides else self._wanted(worker_id)

        return next_to_move(self.fleet.workers, wanted, self._settings.min_ready)

    async def _roll_out(self) -> None:
        """Brings workers to their plans, one after the other, for as long as none fails.

        Where it is urgent, one begins while the sequences of the one before still move.
        """
        while True:
            lost = self.fleet.find(self._rollout.lost)
            if self._rollout.halted and lost is not None and lost.is_serving:
                log.info("%s answers again, the rollout goes on", lost.worker_id)
                self._rollout.halted = self._rollout.lost = ""
            moved = False
            if not self._rollout.halted:
                async with self._rollout_lock:
                    moved = await self._move_next()
            if not moved:
                await _wait(self._chosen, self._settings.telemetry_seconds)

    def _threshold(self, plan: Plan) -> float | None:
        """The confidence that the plan's exit was calibrated to on recent requests; None: not profiled."""
        profile = self._history.profiles.get(plan.model)
        exits = profile.exits if profile is not None else ()
        return next((one.threshold for one in exits if one.depth == plan.depth), None)

    async def _move_next(self) -> bool:
        if self._rollout.urgent:
            return await move_overlapping(self._to_move, self._move)
        found = self._to_move()
        return found is not None and await self._move(*found)

    async def _move(self, worker: Worker, plan: Plan, loaded: asyncio.Event | None = None) -> bool:
        """Whether the worker came along. `loaded` is set when it has loaded the plan."""
        try:
            moved = await reload(
                worker,
                plan,
                self._settings.reload_timeout_seconds,
                self._threshold(plan),
                urgent=self._rollout.urgent,
                loaded=loaded,
            )
        except HeliosError as error:
            self._rollout.halt(worker, plan, error)
            await self._after_halt(worker, plan, error)
            return False
        self._rollout.add(moved)
        return True

    async def _after_halt(self, worker: Worker, plan: Plan, error: HeliosError) -> None:
        """Tells the record; a plan that a worker refused is out, and another one is looked for."""
        try:
            if self._measuring is not None:
                measuring = self._measuring
                await self._record_outcome()
                self._measuring = measuring
            refused = not isinstance(error, WorkerLostError)
            if refused and self.state.pin_of(worker.worker_id) is None:
                why = f"{worker.worker_id} could not load it: {error.message}"
                bar = Bar(model=plan.model, depth=plan.depth, time=time.time(), reason=why)
                await self._decide(Trigger.FAILURE, bar)
                if self.state.plan == plan:
                    self._rollout.halt(worker, plan, error)
        except (RedisError, OSError, HeliosError) as unrecorded:
            log.warning("the halt could not be recorded: %s", unrecorded)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Waits until the event is set, but no longer than that. What was set meanwhile counts at once."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    event.clear()
