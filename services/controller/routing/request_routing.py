"""Keeps the router up to date: learns it, finds the sets of plans that it needs, and gives it to workers."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from redis.asyncio import Redis

from helios import examples
from helios.history import ModelProfile
from helios.routing.example import Example, joined
from helios.routing.knowledge import Knowledge
from helios.routing.router import Router
from helios.routing.terms import Terms, settle
from helios.served import ServedPlan
from helios.v1 import controller_pb2
from services.controller.agenda import Evaluate
from services.controller.allowance import Allowance
from services.controller.candidates import Candidates
from services.controller.fleet import Fleet, Worker
from services.controller.history import History
from services.controller.leader import Leadership
from services.controller.policy.sets import union
from services.controller.reload import serves
from services.controller.replica import Replica
from services.controller.routing import router_store
from services.controller.routing.expectation import Demand, Expectation, usable
from services.controller.routing.learning import Learning
from services.controller.routing.offer import Answer, Question, find_sets, why_single
from services.controller.routing.pushes import Pushes
from services.controller.routing.recent_prompts import RecentPrompts, recent
from services.controller.routing.settings import Routing
from services.controller.settings import ControllerSettings
from services.controller.situation import SetOffer, WorkerView
from services.controller.workload import Workload

log = logging.getLogger(__name__)

# A router is pushed again once a price, or the share of the low one, has changed by more than this.
_CHANGE = 0.05
# Parts of the terms of which any change matters.
_EXACT = ("usual_model", "unlike_model", "bound", "is_best_effort")


class RequestRouting:
    """The router and everything about it. It only advises; the decisions are those of the policy."""

    def __init__(
        self,
        redis: Redis,
        settings: ControllerSettings,
        leadership: Leadership,
        replica: Replica,
        fleet: Fleet,
        history: History,
        candidates: Candidates,
        workload: Workload,
    ) -> None:
        self._redis = redis
        self._settings = settings
        self._leadership = leadership
        self._replica = replica
        self._fleet = fleet
        self._history = history
        self._candidates = candidates
        self._workload = workload
        self._pushes = Pushes(settings.worker_timeout_seconds)
        self._forget(Allowance(settings.profiling_share))

    def _forget(self, allowance: Allowance) -> None:
        self._learning = Learning(self._settings.routing_growth, allowance)
        self._prompts = RecentPrompts()
        # None: they have not been read.
        self._examples: list[Example] | None = None
        self._answer = Answer()
        self._no_offer = "nothing has been decided yet"
        self._refused: set[frozenset[ServedPlan]] = set()
        # For what the sets were looked for last, and at which count of finished requests.
        self._asked_for: Hashable = None
        self._asked_at = 0
        # The count at which to look again, because a dwell held a change up. None: none was held up.
        self._again_at: int | None = None
        self._router: Router | None = None
        self._json = b""
        # The last number that any controller has given, and whether Redis has a router. None: not read.
        self._number = 0
        self._is_stored: bool | None = None
        self._set_aside = ""
        self._settled_at = 0.0
        # Whether something has come since then on which terms depend.
        self._is_unsettled = True

    def begin_anew(self, allowance: Allowance) -> None:
        """Called when this replica begins to lead. What it knew is forgotten. allowance: of all profiling."""
        self._forget(allowance)

    async def close(self) -> None:
        """Ends what is being sent to workers."""
        await self._pushes.close()

    # -- what it says -----------------------------------------------------------------------------

    @property
    def is_wanted(self) -> bool:
        """Whether the operator wants a plan for each request."""
        return self._settings.routing is Routing.REQUEST

    @property
    def is_in_force(self) -> bool:
        """Whether workers have sets of plans from which a router chooses."""
        return self._settings.mode == "active" and bool(self._replica.state.plans)

    @property
    def offer(self) -> SetOffer | None:
        """The best sets of plans, as last looked for. None: there are none."""
        best = self._answer.best
        if best is None:
            return None
        surprise = self._prompts.surprise()
        return SetOffer(
            plans=best.layout.plans,
            seconds=best.terms.seconds,
            single=best.single,
            single_seconds=best.single_seconds,
            examples=len(best.knowledge.features),
            price=best.terms.price,
            increase=best.terms.increase,
            error=best.terms.error,
            served_surprise=None if surprise is None else surprise.nats,
            served_error=None if surprise is None else surprise.error,
            is_best_effort=best.terms.is_best_effort,
            unlike_share=self._prompts.unlike_share,
        )

    @property
    def no_offer(self) -> str:
        """Why there is no offer, in words. Empty if there is one, or if no router is wanted."""
        return self._no_offer if self.is_wanted else ""

    @property
    def router(self) -> Router | None:
        """The router that workers are given. None: there is none."""
        return self._router

    def problems(self) -> list[str]:
        """Messages about current problems."""
        found = [self._set_aside, *self._pushes.problems()]
        terms = None if self._router is None else self._router.terms
        if terms is not None and terms.is_best_effort:
            found.append(
                f"no choice of plans is expected to keep perplexity within {terms.bound:+.1%}; the best that "
                f"can be had is {terms.increase:+.1%}"
            )
        return [one for one in found if one]

    def state(self) -> controller_pb2.RouterState | None:
        """The router for `GetPlan`. None: no router is wanted."""
        if not self.is_wanted:
            return None
        state = controller_pb2.RouterState(examples=len(self._examples or ()), problem=self._no_offer)
        if self._router is None:
            return state
        terms, surprise = self._router.terms, self._prompts.surprise()
        state.number, state.examples = self._router.number, len(self._router.knowledge.features)
        state.price, state.low_price, state.low_share = terms.price, terms.low_price, terms.low_share
        state.bound, state.expected_increase, state.error = terms.bound, terms.increase, terms.error
        if surprise is not None:
            state.served_surprise, state.served_surprise_error = surprise
        for plan, share in self._prompts.shares().items():
            state.shares.add(model=plan.model, depth=plan.depth, share=share)
        return state

    # -- learning ---------------------------------------------------------------------------------

    def evaluation_due(self, finished: int) -> Evaluate | None:
        """The evaluation for the router that is due. finished: count of finished requests."""
        if (
            not self.is_wanted
            or self._examples is None
            or why_single(self._replica.state.slo, self._settings)
        ):
            return None
        known = self._knowledge()
        of_kind: dict[str, int] = {}
        if known is not None:
            of_kind = dict(Counter(known.models[at] for at in known.best_models.tolist()))
        return self._learning.due(finished, time.monotonic(), len(self._examples), of_kind)

    def traffic_changed(self) -> None:
        """Notes that a drift was noticed under a single plan. Then the router must learn new traffic."""
        self._learning.traffic_changed()

    def evaluation_began(self, finished: int) -> None:
        """Notes that an evaluation for the router has begun."""
        self._learning.began(finished, time.monotonic())

    async def evaluation_ended(self, cpu_seconds: float, *, failed: bool) -> None:
        """Takes in what an evaluation has found. Raises redis.RedisError."""
        self._learning.ended(cpu_seconds, self._fleet.threads, failed=failed)
        await self._read_examples()

    def next_evaluation(self, finished: int) -> str:
        """When the next evaluation for the router is due, in words."""
        return self._learning.in_words(finished)

    async def _read_examples(self) -> None:
        names = [name for name in await self._names() if name in self._history.profiles]
        by_model = await examples.read(self._redis, names)
        # A model that has only just become a candidate does not hold up the others.
        least = self._settings.routing_least_examples
        ready = {name: found for name, found in by_model.items() if len(found) >= least} or by_model
        profiles = {name: self._history.profiles[name] for name in ready}
        self._examples = usable(joined(ready), profiles)[-self._settings.routing_examples :]

    async def _names(self) -> tuple[str, ...]:
        return await self._candidates.names(self._replica.state.slo.objective)

    # -- sets of plans ----------------------------------------------------------------------------

    def is_due(self, finished: int, every: int) -> bool:
        """Whether to look for sets again: something has changed, or `every` requests have finished."""
        due_at = self._asked_at + every if self._again_at is None else self._again_at
        return self.is_wanted and (self._subject() != self._asked_for or finished >= due_at)

    def look_again(self, finished: int) -> None:
        """Sets are looked for again at this count of finished requests, if not earlier."""
        self._again_at = finished

    def refuse(self, plans: Sequence[ServedPlan]) -> None:
        """Notes that a worker could not load a set. No set that contains it is offered again."""
        self._refused.add(frozenset(plans))

    async def look(self, finished: int) -> None:
        """Looks for the best sets of plans. Then `offer` and `no_offer` are up to date."""
        if not self.is_wanted:
            return
        if self._examples is None:
            await self._read_examples()
        subject = self._subject()
        before = self._answer if subject == self._asked_for else Answer()
        self._asked_for, self._asked_at, self._again_at = subject, finished, None
        self._answer, self._no_offer = await self._looked(before)
        self._is_unsettled = True

    async def _looked(self, before: Answer) -> tuple[Answer, str]:
        """The answer, and why there is none in words."""
        why = why_single(self._replica.state.slo, self._settings)
        workers = [worker.view(pinned=False) for worker in self._free()]
        if why or not workers:
            return Answer(), why
        names = self._examples[0].rest_nats if self._examples else ()
        profiles = {name: one for name in names if (one := self._history.profiles.get(name)) is not None}
        known, least = usable(self._examples or (), profiles), self._settings.routing_least_examples
        if len(known) < least or len(profiles) < len(names):
            why = f"{len(known)} requests have been evaluated for the router, {least} are needed"
            return Answer(), why + (", and there is no profiler" if self._settings.profiler is None else "")
        answer = await asyncio.to_thread(find_sets, self._question(known, profiles, workers, before))
        return answer, "" if answer.best is not None else "the workers' memory holds no set of plans"

    def _question(
        self,
        known: Sequence[Example],
        profiles: Mapping[str, ModelProfile],
        workers: Sequence[WorkerView],
        before: Answer,
    ) -> Question:
        state, settings, prompts = self._replica.state, self._settings, self._prompts.prompts
        in_flight = sum(worker.running + worker.waiting for worker in workers)
        return Question(
            examples=known,
            profiles=profiles,
            workers=workers,
            demand=Demand(
                self._workload.prompt_tokens,
                self._workload.output_tokens,
                -(-in_flight // len(workers)),
                state.slo.objective,
            ),
            in_force=state.plans if self._settings.mode == "active" else {},
            bound=self._bound(),
            min_gain=settings.min_gain,
            recent=lambda knowledge: recent(prompts, knowledge),
            refused=tuple(self._refused),
            bars=state.bars,
            before=before,
        )

    def _subject(self) -> Hashable:
        """That on which the best sets depend, besides the recent requests."""
        return (
            tuple((worker.worker_id, worker.memory_bytes) for worker in self._free()),
            tuple(sorted(self._history.times.items())),
            self._replica.state.slo,
            # A new list is read after each evaluation.
            id(self._examples),
        )

    def _free(self) -> list[Worker]:
        pins = self._replica.state
        return [worker for worker in self._fleet.serving if pins.pin_of(worker.worker_id) is None]

    def _bound(self) -> float:
        return (self._replica.state.slo.max_perplexity_increase or 0.0) * self._settings.bound_share

    # -- the router -------------------------------------------------------------------------------

    async def step(self) -> None:
        """Takes in the prompts that were routed, brings the router up to date, and gives it to workers.

        Raises StaleLeaderError, redis.RedisError.
        """
        if self._is_stored is None:
            stored = await router_store.find(self._leadership)
            self._is_stored = stored is not None
            self._number, self._set_aside = stored or router_store.Stored()
            if self._set_aside:
                log.warning("%s", self._set_aside)
        if self._settings.mode != "active":
            return
        if not self.is_in_force:
            await self._take_away()
            return
        expected = self._in_force()
        if expected is None:
            return
        seen = self._prompts.add(self._fleet.take_prompts(), expected.knowledge)
        self._learning.saw(seen)
        self._is_unsettled |= bool(seen)
        now = time.monotonic()
        if self._is_unsettled and now >= self._settled_at + self._settings.routing_push_seconds:
            self._settled_at, self._is_unsettled = now, False
            await self._settle(expected.knowledge)
        if self._router is not None:
            # A worker that has not loaded its set yet goes on without.
            wanted = self._replica.state.wanted_plans
            able = [worker for worker in self._free() if serves(worker, wanted(worker.worker_id))]
            self._pushes.push(able, self._router.number, self._json)

    async def _settle(self, knowledge: Knowledge) -> None:
        before, found = self._router, self._prompts.recent(knowledge)
        terms = await asyncio.to_thread(settle, knowledge, found, self._bound())
        if before is not None and before.knowledge is knowledge and not has_changed(before.terms, terms):
            return
        at_workers = [one.telemetry.router_number for one in self._fleet.serving if one.telemetry is not None]
        number = 1 + max([self._number, *at_workers])
        router = Router(number=number, knowledge=knowledge, terms=terms)
        written = await asyncio.to_thread(router.to_json)
        await router_store.save(self._leadership, written)
        self._router, self._json, self._number = router, written, number
        self._is_stored, self._set_aside = True, ""
        log.info(
            "router %d: %d examples, %.3g us a nat, perplexity %+.2f %% expected",
            number,
            len(knowledge.features),
            1e6 * terms.price,
            100 * terms.increase,
        )

    async def _take_away(self) -> None:
        """Lets workers go on without a router, so that they do not probe prompts for a single plan."""
        if self._is_stored:
            await router_store.delete(self._leadership)
            self._is_stored = False
        self._router, self._json = None, b""
        self._pushes.push(self._fleet.serving, 0, b"")

    def _in_force(self) -> Expectation | None:
        """What is expected of the sets in force. None: there are none, or they were not looked at yet."""
        return self._answer.expected.get(union(self._replica.state.plans))

    def _knowledge(self) -> Knowledge | None:
        best = self._in_force() or self._answer.best
        return None if best is None else best.knowledge


def has_changed(before: Terms, now: Terms) -> bool:
    """Whether terms have changed by so much that workers need them."""

    def differs(one: float, other: float) -> bool:
        return abs(one - other) > _CHANGE * max(abs(one), abs(other))

    return (
        any(getattr(before, name) != getattr(now, name) for name in _EXACT)
        or differs(before.price, now.price)
        or differs(before.low_price, now.low_price)
        or abs(before.low_share - now.low_share) > _CHANGE
    )
