"""Chooses among the options: the best by the SLO, the answer to a breach, or the safest known plan."""

from collections import Counter
from collections.abc import Sequence

from helios.served import ServedPlan
from helios.slo import Objective, Slo
from services.controller.decision import Option
from services.controller.policy.bounds import QUALITY
from services.controller.policy.breach import is_breached
from services.controller.policy.options import Weighed
from services.controller.policy.settings import PolicySettings
from services.controller.situation import Situation, Trigger


def best_by_slo(
    weighed: Sequence[Weighed], before: ServedPlan | None, situation: Situation, settings: PolicySettings
) -> tuple[ServedPlan | None, str]:
    """The best option by the SLO, with hysteresis in favour of the plan in force."""
    stays = f"{before} stays" if before is not None else "nothing is changed"
    if not situation.workers:
        return before, f"{stays}: no worker serves"
    missing = [name for name in situation.candidates if name not in situation.history]
    unknown = f" (not profiled: {', '.join(missing)})" if missing else ""
    if not weighed:
        return before, f"{stays}: no candidate has been profiled{unknown}"
    if not any(one.eligible for one in weighed):
        bounds = Counter(bound for one in weighed for bound in one.refusals)
        named = ", ".join(
            f"{bound} refuses {count} of {len(weighed)}" for bound, count in bounds.most_common()
        )
        return before, f"{stays}: no option satisfies all bounds ({named}){unknown}"

    objective = situation.slo.objective
    pool = _entrants(weighed, before, situation.slo, settings)
    if objective is not Objective.ACCURACY:
        pool = _smallest_depths(pool)
    current = next((one for one in weighed if one.option.plan == before), None)
    best = min(pool, key=lambda one: _rank(one.option, before))
    for one in weighed:
        if one.eligible and one is not best:
            one.note = f"{best.option.plan} is better, costs included"
    chosen = f"{best.option.plan} is the best for {objective} within the bounds{unknown}"
    if before is None or current is None:
        return best.option.plan, chosen
    if best is current:
        return before, f"{stays}: it is the best for {objective} within the bounds{unknown}"
    if not current.eligible:
        return best.option.plan, f"{chosen}; {before} is out: {'; '.join(current.refusals.values())}"
    gain = 1 - best.option.loss / current.option.loss
    if gain <= 0:
        return before, f"{stays}: {best.option.plan} would not pay, its cost included"
    # No hysteresis if the operator has just changed the SLO, or if nobody has chosen the plan in force.
    at_once = situation.trigger is Trigger.SLO or situation.plan is None
    if not at_once and gain < settings.min_gain:
        best.note = f"gains {gain:.1%}, less than {settings.min_gain:.1%}"
        return before, f"{stays}: {best.option.plan} {best.note}"
    since = situation.requests_since_move
    if (
        since is not None
        and since < settings.min_dwell_requests
        and not at_once
        and situation.trigger in (Trigger.REASSESSMENT, Trigger.FOLLOW_UP)
    ):
        best.note = f"the plan in force is {since} requests old, its dwell {settings.min_dwell_requests}"
        best.dwell_left = settings.min_dwell_requests - since
        return before, f"{stays}: {best.note}"
    return best.option.plan, f"{chosen}, a gain of {gain:.1%} over {before}, its cost included"


def _entrants(
    weighed: Sequence[Weighed], before: ServedPlan | None, slo: Slo, settings: PolicySettings
) -> list[Weighed]:
    """The options that may be chosen: those within the bounds.

    A new plan must keep a distance from the bounds if any option does. Otherwise a plan very near a bound
    would be accepted after one measurement and refused after the next.
    """
    share = 1 - settings.bound_margin

    def is_safe(option: Option) -> bool:
        # A perplexity with a known error needs no margin here, because `leave_sigmas` provides one.
        is_noisy = option.perplexity_increase_error is None
        # Each is a distance from perfect, so that one comparison works for upper and lower bounds.
        distances = (
            (option.perplexity_increase, slo.max_perplexity_increase if is_noisy else None),
            (option.ttft_seconds, slo.max_ttft_seconds),
            (option.tpot_seconds, slo.max_tpot_seconds),
            (1 - option.agreement, None if slo.min_agreement is None else 1 - slo.min_agreement),
            (1 - option.exit_share, None if settings.min_exit_share is None else 1 - settings.min_exit_share),
        )
        return all(limit is None or distance <= limit * share for distance, limit in distances)

    eligible = [one for one in weighed if one.eligible]
    bound = slo.max_perplexity_increase
    if bound is not None:
        stays = any(one.option.plan == before for one in eligible)

        def is_sure(one: Weighed) -> bool:
            if before is not None and one.option.model == before.model:
                return one.is_surely_within(bound, settings.enter_sigmas, None)
            switch_sigmas = settings.switch_sigmas if stays else settings.enter_sigmas
            return one.is_surely_within(bound, settings.enter_sigmas, switch_sigmas)

        # A new plan must be within the bound by more than chance, if any plan is.
        eligible = [one for one in eligible if one.option.plan == before or is_sure(one)] or eligible
    return [one for one in eligible if one.option.plan == before or is_safe(one.option)] or eligible


def _smallest_depths(weighed: Sequence[Weighed]) -> list[Weighed]:
    """The smallest depth of each model. Options are sorted by ascending depth."""
    smallest: dict[str, Weighed] = {}
    for one in weighed:
        smallest.setdefault(one.option.model, one)
    return list(smallest.values())


def _rank(option: Option, before: ServedPlan | None) -> tuple[float, float, bool, str, int]:
    """Sort key of options: by objective, then speed, then the plan in force first, then name."""
    return option.loss, -option.tokens_per_second, option.plan != before, option.model, option.depth


def answer_breach(
    weighed: Sequence[Weighed], before: ServedPlan, situation: Situation, settings: PolicySettings
) -> tuple[ServedPlan | None, str]:
    """The cheaper of deeper and switch, by the time of the next interval's tokens plus the move itself."""
    deeper = [one for one in weighed if one.option.model == before.model and one.option.depth > before.depth]
    pool = [one for one in deeper if one.eligible][:1]
    others = dict.fromkeys(one.option.model for one in weighed if one.option.model != before.model)
    for model in others:
        pool += [one for one in weighed if one.option.model == model and one.eligible][:1]
    counts = ", ".join(
        f"{worker.worker_id} {worker.window_high_exit_tokens} of {worker.window_tokens}"
        for worker in situation.free
        if is_breached(worker, situation.history.get(worker.model), settings)
    )
    seen = f"unsure tokens in the window: {counts or 'at the limit'}"
    if not pool:
        return before, f"{seen}; {before} stays, there is no deeper exit or other model within the bounds"
    tokens = settings.reassess_requests * situation.output_tokens / max(1, len(situation.free))

    def seconds(one: Weighed) -> float:
        if situation.slo.objective is Objective.THROUGHPUT:
            return tokens / one.option.tokens_per_second + one.option.cost_seconds
        return tokens * one.option.tpot_seconds + one.option.cost_seconds

    best = min(pool, key=lambda one: (seconds(one), one.option.model, one.option.depth))
    for one in weighed:
        if one.eligible and one is not best:
            one.note = (
                f"{seconds(one):.3g} s for the next interval, {best.option.plan} needs {seconds(best):.3g} s"
                if one in pool
                else f"{best.option.plan} is the cheaper answer"
            )
    kind = "deeper" if best.option.model == before.model else "switch"
    return best.option.plan, f"{seen}; {kind} to {best.option.plan} is the cheapest answer"


def retreat(weighed: Sequence[Weighed], before: ServedPlan) -> tuple[ServedPlan, str]:
    """The known plan with the best quality. It serves until the new traffic is evaluated."""
    said = "the traffic has changed and is not evaluated yet"
    known = [one for one in weighed if one.eligible]
    known = known or [one for one in weighed if set(one.refusals) <= {QUALITY, "min_agreement"}]
    if not known:
        return before, f"{said}; {before} stays, no other plan is possible"
    safest = min(known, key=lambda one: (one.option.perplexity_increase, -one.option.depth, one.option.model))
    if safest.option.plan == before:
        return before, f"{said}; {before} stays, it is the safest plan known"
    return safest.option.plan, f"{said}; {safest.option.plan} is the safest plan known"


def excuse(
    weighed: Sequence[Weighed], before: ServedPlan | None, plan: ServedPlan | None, situation: Situation
) -> str:
    """Why the plan stays although its measured perplexity exceeds the bound. Empty if it does not."""
    bound = situation.slo.max_perplexity_increase
    option = next((one.option for one in weighed if one.option.plan == plan), None)
    if plan != before or option is None or bound is None or option.perplexity_increase <= bound:
        return ""
    requests = len(situation.history[option.model].samples)
    counted = f"{requests} request" + ("" if requests == 1 else "s")
    measured = f"; its perplexity was measured at {option.perplexity_increase:+.1%}, on {counted}"
    if option.perplexity_increase_error is None:
        return f"{measured}: too few to tell that from the bound of {bound:.1%}"
    return f"{measured} with a standard error of {option.perplexity_increase_error:.1%}, bound {bound:.1%}"


def undecided(
    weighed: Sequence[Weighed], plan: ServedPlan | None, slo: Slo, settings: PolicySettings
) -> tuple[str, ...]:
    """Models of which more requests should be evaluated, because chance may have decided.

    The chosen plan may really exceed the bound on perplexity, or a cheaper one may keep it.
    """
    bound = slo.max_perplexity_increase
    chosen = next((one.option for one in weighed if one.option.plan == plan), None)
    if bound is None or chosen is None:
        return ()
    found = set()
    for one in weighed:
        option, sigmas = one.option, settings.decide_sigmas
        matters = option is chosen or option.loss < chosen.loss * (1 - settings.min_gain)
        is_known = all(error is not None for _, error, _ in one.increases)
        doubtful = not is_known or not (
            one.is_surely_within(bound, sigmas, sigmas) or one.is_surely_beyond(bound, sigmas)
        )
        if matters and doubtful and set(one.refusals) <= {QUALITY}:
            found.add(option.model)
    # The best candidate at full depth must be evaluated too, because all others are compared with it.
    if found:
        found |= {
            one.option.model
            for one in weighed
            if any(increase == 0 for increase, _, _ in one.increases)
            and not one.is_surely_beyond(0.0, settings.decide_sigmas)
        }
    return tuple(sorted(found))
