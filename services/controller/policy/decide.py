"""Decides which plan the workers must serve, and gives the reason."""

from collections import Counter
from collections.abc import Sequence

from helios.orders import EVERY_WORKER
from helios.served import ServedPlan
from services.controller.decision import Decision, WorkerPlan
from services.controller.policy.choice import answer_breach, best_by_slo, excuse, retreat, undecided
from services.controller.policy.options import Weighed, weigh
from services.controller.policy.sets import Sets, choose_sets
from services.controller.policy.settings import PolicySettings
from services.controller.situation import Situation, Trigger, WorkerView

_AFTER_A_DRIFT = (Trigger.DRIFT, Trigger.RETREAT)


def decide(situation: Situation, settings: PolicySettings) -> Decision:
    """The plan for all workers that are not pinned, from the measurements of every option.

    The plan in force stays if nothing is known, if no option satisfies all bounds, or if no other option is
    better by `min_gain`. The decision's reason says which.
    """
    before = _in_force(situation)
    weighed = list(weigh(situation, settings, before))
    if situation.trigger is Trigger.BREACH and before is not None:
        plan, reason = answer_breach(weighed, before, situation, settings)
    elif situation.trigger is Trigger.RETREAT and before is not None:
        plan, reason = retreat(weighed, before)
    else:
        plan, reason = best_by_slo(weighed, before, situation, settings)
    reason += excuse(weighed, before, plan, situation)
    sets = choose_sets(situation, plan, settings)
    offer = situation.offer
    if situation.trigger is Trigger.ROUTING and situation.plans and not sets.plans and offer is not None:
        # While a router served, the profiles were not renewed. What it has learnt is newer.
        plan, reason = (
            offer.single,
            f"{offer.single} is the quickest single plan by what the router has learnt",
        )
    if sets.reason:
        reason = f"{sets.reason}; without it: {reason}" if sets.plans else f"{sets.reason}; {reason}"
    if situation.delayed_seconds:
        waited = f"{situation.delayed_seconds:.0f} s"
        reason += f"; put off for {waited}, so that profiling stays within its share of CPU"
    held = sorted(worker.worker_id for worker in situation.workers if worker.pinned)
    if held:
        reason += f"; an operator holds {', '.join(held)}"
    chosen = tuple(
        WorkerPlan(worker_id=worker.worker_id, model=one.model, depth=one.depth, pinned=worker.pinned)
        for worker in situation.workers
        for one in _plans_of(worker, sets.plans, plan)
    )
    return Decision(
        trigger=situation.trigger,
        before=before,
        plan=plan,
        plans_before=situation.plans,
        plans=sets.plans,
        chosen=chosen,
        options=tuple(one.explained(plan) for one in weighed),
        reason=reason,
        again_after_requests=sets.dwell_left
        if situation.trigger is Trigger.ROUTING
        else next((one.dwell_left for one in weighed if one.dwell_left is not None), None),
        undecided=undecided(weighed, plan, situation.slo, settings),
        urgent=plan != before
        and not sets.plans
        and (_is_out(weighed, before) or situation.trigger in _AFTER_A_DRIFT),
    )


def _plans_of(worker: WorkerView, sets: Sets, plan: ServedPlan | None) -> tuple[ServedPlan, ...]:
    """The plans chosen for a worker: its pin, its set, or the single plan."""
    if worker.pinned:
        return (worker.plan,)
    return sets.get(worker.worker_id) or sets.get(EVERY_WORKER) or (worker.plan if plan is None else plan,)


def contradiction(situation: Situation, settings: PolicySettings) -> str | None:
    """The SLO's bounds that no profiled option satisfies together. None if one does, or none is known."""
    clean = situation.model_copy(update={"bars": ()})
    weighed = list(weigh(clean, settings, _in_force(clean)))
    if not weighed or any(one.eligible for one in weighed):
        return None
    by_bound = Counter(bound for one in weighed for bound in one.refusals)
    named = ", ".join(f"{bound} refuses {count}" for bound, count in by_bound.most_common())
    nearest = min(weighed, key=lambda one: len(one.refusals))
    return (
        f"no option satisfies all bounds: of {len(weighed)}, {named}; {nearest.option.plan} breaks the "
        f"fewest ({'; '.join(nearest.refusals.values())}); loosen one"
    )


def _in_force(situation: Situation) -> ServedPlan | None:
    """The plan chosen last, unless it failed to load. Otherwise the plan that most unpinned workers serve."""
    chosen = situation.plan
    if chosen is not None and not _has_failed(chosen, situation):
        return chosen
    served = Counter(worker.plan for worker in situation.free)
    return served.most_common(1)[0][0] if served else chosen


def _is_out(weighed: Sequence[Weighed], plan: ServedPlan | None) -> bool:
    """Whether the plan breaks a bound."""
    return any(one.refusals for one in weighed if one.option.plan == plan)


def _has_failed(plan: ServedPlan, situation: Situation) -> bool:
    profile = situation.history.get(plan.model)
    return profile is not None and any(
        bar.covers(profile, plan.depth) for bar in situation.bars if not bar.shallower
    )
