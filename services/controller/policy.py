"""The policy (arXiv 2504.10724): which model and depth to serve, and why.

Pure functions: no IO, no clock, no chance. What they take and return is JSON, so `decide` can be replayed
from the decision record.
"""

import enum
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from pydantic import Field

from helios.history import ExitProfile, ModelProfile
from helios.slo import Objective, Slo
from services.controller.decision import Decision, Option, WorkerPlan
from services.controller.situation import Plan, Reading, Record, Situation, Trigger, WorkerView

_AFTER_A_DRIFT = (Trigger.DRIFT, Trigger.RETREAT)
# exp() of more overflows; such an option is refused by any bound.
_MAX_EXPONENT = 700.0
# A rise of perplexity over a candidate at full depth, its standard error, and whether it is the same model.
_Increase: TypeAlias = tuple[float, float | None, bool]
_QUALITY = "max_perplexity_increase"
# Requests from which a standard error can be told.
_FEWEST_PAIRS = 2
# Standard errors between the evaluated requests and all traffic that may be chance.
_LIKELY_SIGMAS = 3.0
# By what the variance from two or three is multiplied.
_FEW_FACTOR = 5.0
# Requests from which their difference is corrected by what is known of all traffic.
_FEWEST_CONTROLLED = 10


class Moves(enum.StrEnum):
    """Which moves are allowed: the ablation of the paper, and both by default."""

    BOTH = "both"
    SWITCH = "switch"
    DEEPEN = "deepen"


class PolicySettings(Record):
    """What an operator can set about decisions. Shares are in [0, 1]."""

    window_tokens: int = Field(100, ge=1, description="tokens in the window of the breach counter (CBC)")
    breach_limit: int = Field(
        50, ge=1, description="unsure (high-exit) tokens in the window that are a breach (CBCmax)"
    )
    breach_sigmas: float = Field(
        3.0,
        ge=0,
        description="the limit is never nearer than this many standard deviations to the unsure tokens "
        "that the profile itself expects of the plan",
    )
    reassess_requests: int = Field(150, ge=1, description="requests between two reassessments (RI)")
    moves: Moves = Field(Moves.BOTH, description="allowed moves: both, switch (to another model), deepen")
    min_gain: float = Field(
        0.05, ge=0, lt=1, description="share by which a plan must beat the one in force, its cost included"
    )
    min_dwell_requests: int = Field(
        25, ge=0, description="requests for which a plan stays unless it violates the quality bound"
    )
    leave_sigmas: float = Field(
        0.2,
        ge=0,
        description="the plan in force is out once its perplexity is this many standard errors beyond the "
        "bound; a larger value moves less often, and leaves the bound more often",
    )
    stay_sigmas: float = Field(
        0.5,
        ge=0,
        description="the same where it is compared with another model: of two models a few requests say less "
        "than of two depths of one",
    )
    enter_sigmas: float = Field(
        0.75,
        ge=0,
        description="a new plan's perplexity must be this many standard errors within the bound, if one's is",
    )
    switch_sigmas: float = Field(
        1.0,
        ge=0,
        description="the same against other models, while the plan in force is not out: a few requests of "
        "mixed traffic say little of which model is better",
    )
    decide_sigmas: float = Field(
        2.0,
        ge=0,
        description="while a plan that matters is no more than this many standard errors from the bound on "
        "perplexity, more requests are evaluated",
    )
    bound_margin: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of each other bound, and of the perplexity's while its standard error is unknown, "
        "that a new plan must leave unused, where one can",
    )
    min_exit_share: float | None = Field(
        None, ge=0, le=1, description="smallest share of tokens that are sure at the depth; none: no bound"
    )


def breach_limit(worker: WorkerView, profile: ModelProfile | None, settings: PolicySettings) -> int:
    """High-exit tokens in a window from which the worker's plan counts as breached.

    `breach_limit`, unless the profile that the plan was chosen by already expects about as many: a breach
    says that traffic has left what was profiled, not that an exit is unsure by nature (spec, insight 2).
    """
    expected = 0.0
    if profile is not None and any(one.depth == worker.depth for one in profile.exits):
        # None in a profile of so many tokens may still be three in as many others (the rule of three).
        expected = max(1 - exit_share(profile, worker.depth, worker.threshold), 3 / max(profile.tokens, 3))
    mean = expected * settings.window_tokens
    noise = settings.breach_sigmas * math.sqrt(mean * (1 - expected))
    # More than expected: what a profile without any sure token expects is never news.
    return max(settings.breach_limit, math.floor(mean + noise) + 1)


def is_breached(worker: WorkerView, profile: ModelProfile | None, settings: PolicySettings) -> bool:
    """Whether the worker's confidence breach counter has reached its limit in a full window."""
    return _counter(worker, settings) >= breach_limit(worker, profile, settings)


def _counter(worker: WorkerView, settings: PolicySettings) -> float:
    """High-exit tokens in a window's worth of tokens; 0 while the window is not full."""
    if worker.window_tokens < settings.window_tokens:
        return 0.0
    return worker.window_high_exit_tokens * settings.window_tokens / worker.window_tokens


def decide(situation: Situation, settings: PolicySettings) -> Decision:
    """The plan of the workers that are not pinned, from what was measured of every option.

    A plan is kept when nothing is known, when no option satisfies all bounds, and when no other is better by
    `min_gain`; the reason says which.
    """
    before = _in_force(situation)
    weighed = list(_weigh(situation, settings, before))
    if situation.trigger is Trigger.BREACH and before is not None:
        plan, reason = _answer_breach(weighed, before, situation, settings)
    elif situation.trigger is Trigger.RETREAT and before is not None:
        plan, reason = _retreat(weighed, before)
    else:
        plan, reason = _best(weighed, before, situation, settings)
    reason += _excuse(weighed, before, plan, situation)
    if situation.delayed_seconds:
        waited = f"{situation.delayed_seconds:.0f} s"
        reason += f"; put off for {waited}, so that profiling stays within its share of CPU"
    held = sorted(worker.worker_id for worker in situation.workers if worker.pinned)
    if held:
        reason += f"; an operator holds {', '.join(held)}"
    chosen = tuple(
        WorkerPlan(
            worker_id=worker.worker_id,
            model=worker.model if worker.pinned or plan is None else plan.model,
            depth=worker.depth if worker.pinned or plan is None else plan.depth,
            pinned=worker.pinned,
        )
        for worker in situation.workers
    )
    return Decision(
        trigger=situation.trigger,
        before=before,
        plan=plan,
        chosen=chosen,
        options=tuple(one.explained(plan) for one in weighed),
        reason=reason,
        again_after_requests=next((one.dwell_left for one in weighed if one.dwell_left is not None), None),
        undecided=_undecided(weighed, plan, situation.slo, settings),
        urgent=plan != before and (_is_out(weighed, before) or situation.trigger in _AFTER_A_DRIFT),
    )


def _is_out(weighed: Sequence["_Weighed"], plan: Plan | None) -> bool:
    """Whether the plan breaks a bound."""
    return any(one.refusals for one in weighed if one.option.plan == plan)


def contradiction(situation: Situation, settings: PolicySettings) -> str | None:
    """Which bounds of the SLO no profiled option satisfies together; None when one does, or none is known."""
    clean = situation.model_copy(update={"bars": ()})
    weighed = list(_weigh(clean, settings, _in_force(clean)))
    if not weighed or any(one.eligible for one in weighed):
        return None
    by_bound = Counter(bound for one in weighed for bound in one.refusals)
    named = ", ".join(f"{bound} refuses {count}" for bound, count in by_bound.most_common())
    nearest = min(weighed, key=lambda one: len(one.refusals))
    return (
        f"no option satisfies all bounds: of {len(weighed)}, {named}; {nearest.option.plan} breaks the "
        f"fewest ({'; '.join(nearest.refusals.values())}); loosen one"
    )


class _Weighed:
    """An option and the bounds it breaks, by name."""

    def __init__(
        self,
        option: Option,
        refusals: Mapping[str, str],
        increases: Sequence[_Increase],
    ) -> None:
        self.option = option
        self.refusals = dict(refusals)
        # Of perplexity, over each candidate at full depth, with standard errors.
        self.increases = increases
        # Within the bounds, but passed over: said in the record.
        self.note = ""
        # The same, for so many requests: another plan has just been chosen.
        self.dwell_left: int | None = None

    @property
    def eligible(self) -> bool:
        return not self.refusals

    def is_surely_within(self, bound: float, sigmas: float, switch_sigmas: float | None) -> bool:
        """Whether its perplexity is within the bound by more than chance, whichever candidate is the best.

        switch_sigmas: the same against candidates that are other models; None: they do not matter.
        """
        return all(
            increase + (sigmas if is_own else switch_sigmas or 0.0) * (error or 0.0) <= bound
            for increase, error, is_own in self.increases
            if is_own or switch_sigmas is not None
        )

    def is_surely_beyond(self, bound: float, sigmas: float) -> bool:
        """Whether its perplexity is beyond the bound by more than chance."""
        return any(increase - sigmas * (error or 0.0) > bound for increase, error, _ in self.increases)

    def explained(self, chosen: Plan | None) -> Option:
        """The option as it goes into the record."""
        said = "" if self.option.plan == chosen else self.note
        return self.option.model_copy(update={"refused": "; ".join(self.refusals.values()) or said})


def _in_force(situation: Situation) -> Plan | None:
    """The plan chosen last, unless it failed to load; else the one that most free workers serve."""
    chosen = situation.plan
    if chosen is not None and not _has_failed(chosen, situation):
        return chosen
    served = Counter(worker.plan for worker in situation.free)
    return served.most_common(1)[0][0] if served else chosen


def _has_failed(plan: Plan, situation: Situation) -> bool:
    profile = situation.history.get(plan.model)
    return profile is not None and any(
        bar.covers(profile, plan.depth) for bar in situation.bars if not bar.shallower
    )


def exit_share(profile: ModelProfile, depth: int, threshold: float | None = None) -> float:
    """Share of tokens that are sure at a depth, by the profile's threshold or another one.

    Every token leaves at the last layer.
    """
    one = profile.at(depth)
    if one is profile.full:
        return 1.0
    return one.share_above(one.threshold if threshold is None else threshold)


def _weigh(situation: Situation, settings: PolicySettings, before: Plan | None) -> Iterator["_Weighed"]:
    """Every profiled depth of every candidate, with the bounds that it breaks."""
    known = [situation.history[name] for name in situation.candidates if name in situation.history]
    if not known or not situation.workers:
        return
    control = _Control.of(situation)
    for profile in known:
        for one in profile.exits:
            increases = _increases(profile, one, known, control)
            option = _expect(profile, one, increases, situation, settings, before)
            refusals = _refusals(option, increases, profile, one, situation, settings, before)
            yield _Weighed(option, refusals, increases)


def _expect(
    profile: ModelProfile,
    one: ExitProfile,
    increases: Sequence[_Increase],
    situation: Situation,
    settings: PolicySettings,
    before: Plan | None,
) -> Option:
    workers = situation.free or situation.workers
    batch = min(_batch(one, worker, situation) for worker in workers)
    in_flight = sum(worker.running + worker.waiting for worker in workers)
    load = max(1, min(-(-in_flight // len(workers)), batch))
    tpot = one.step_seconds(load)
    # Batch 1 measured, plus the step under way when a request arrives at a loaded worker.
    ttft = one.ttft_seconds + (tpot if load > 1 else 0.0)
    prefill = situation.prompt_tokens / situation.output_tokens / one.prefill_tokens_per_second
    # A batch of none is refused for memory; its figures are those of one sequence.
    full_batch = max(1, batch)
    token_seconds = one.step_seconds(full_batch) / full_batch + prefill
    # The best candidate is the one over which it rises most.
    increase, error, _ = max(increases, key=lambda one: one[0])
    plan = Plan(model=profile.model, depth=one.depth)
    cost = _cost(plan, one, workers, before)
    horizon_tokens = settings.reassess_requests * situation.output_tokens / len(workers)
    response = tpot + ttft / situation.output_tokens
    losses = {
        Objective.THROUGHPUT: token_seconds + cost / horizon_tokens,
        Objective.LATENCY: response + cost / horizon_tokens,
        # A reload draws about what serving draws, for as long as it takes.
        Objective.ENERGY: (one.joules_per_token or 0.0) * (1 + cost / (horizon_tokens * token_seconds)),
        Objective.ACCURACY: 1 + increase,
    }
    return Option(
        model=profile.model,
        depth=one.depth,
        tokens_per_second=1 / token_seconds,
        batch=batch,
        tpot_seconds=tpot,
        ttft_seconds=ttft,
        perplexity_increase=increase,
        perplexity_increase_error=error,
        agreement=one.agreement,
        exit_share=exit_share(profile, one.depth),
        joules_per_token=one.joules_per_token,
        cost_seconds=cost,
        loss=losses[situation.slo.objective],
    )


def _increases(
    profile: ModelProfile, one: ExitProfile, references: Sequence[ModelProfile], control: "_Control | None"
) -> tuple[_Increase, ...]:
    """Rise of perplexity over each candidate at full depth, and its standard error: shares per token."""
    # One measure for all, so that they can be compared: a token of the best.
    best = min(references, key=lambda profile: (profile.full.nats_per_byte, profile.model))
    found = []
    for reference in references:
        nats, error = _excess(profile, one, reference, control)
        increase = math.expm1(min(nats * best.bytes_per_token, _MAX_EXPONENT))
        share = None if error is None else (1 + increase) * error * best.bytes_per_token
        found.append((increase, share, reference is profile))
    return tuple(found)


class _Control:
    """A control variate: what all recent prompts gave under the plan that is served.

    The few requests that were evaluated are easier or harder than the traffic by chance. The plan that is
    served has read both, so it tells by how much. The difference of two options is corrected by regression on
    that (Cochran, Sampling Techniques, 7).
    """

    def __init__(self, reading: Reading, profile: ModelProfile) -> None:
        index = profile.exits.index(profile.at(reading.depth))
        # Nats under the plan, by request.
        self.nats = {sample.id: sample.nats[index] for sample in profile.samples}
        # All per byte, as the options are compared.
        self.mean = reading.nats_per_token / profile.bytes_per_token
        self.variance = (reading.error / profile.bytes_per_token) ** 2

    @classmethod
    def of(cls, situation: Situation) -> "_Control | None":
        """None where nothing was read, or the plan was not profiled."""
        reading = situation.reading
        profile = None if reading is None else situation.history.get(reading.model)
        if reading is None or profile is None or all(one.depth != reading.depth for one in profile.exits):
            return None
        return cls(reading, profile)


def _excess(
    profile: ModelProfile, one: ExitProfile, reference: ModelProfile, control: _Control | None
) -> tuple[float, float | None]:
    """Nats per byte over the reference at full depth, and the standard error of that.

    Both from the requests that both models were evaluated on: what they find hard alike cancels out. With
    fewer than two of them it is the difference of the means, its error unknown.
    """
    index = profile.exits.index(one)
    others = {sample.id: sample for sample in reference.samples}
    pairs = [(sample, others[sample.id]) for sample in profile.samples if sample.id in others]
    # All samples of a request are of one text.
    sizes = [own.text_bytes for own, _ in pairs]
    if len(pairs) < _FEWEST_PAIRS or not sum(sizes):
        return one.nats_per_byte - reference.full.nats_per_byte, None
    excess, residuals = _rate([own.nats[index] - other.nats[-1] for own, other in pairs], sizes)
    count = len(pairs)
    variance = math.fsum(r * r for r in residuals) / (count * (count - 1))
    if (
        control is not None
        and count >= _FEWEST_CONTROLLED
        and all(own.id in control.nats for own, _ in pairs)
    ):
        mean, deviations = _rate([control.nats[own.id] for own, _ in pairs], sizes)
        spread = math.fsum(d * d for d in deviations)
        own_variance = spread / (count * (count - 1))
        # What differs by more than chance is not the same traffic, or not the same part of its prompts.
        likely = _LIKELY_SIGMAS * math.sqrt(own_variance + control.variance)
        if spread and abs(control.mean - mean) <= likely:
            slope = math.fsum(r * d for r, d in zip(residuals, deviations, strict=True)) / spread
            # The two means are weighed by how sure they are.
            slope *= own_variance / (own_variance + control.variance)
            excess += slope * (control.mean - mean)
            left = math.fsum((r - slope * d) ** 2 for r, d in zip(residuals, deviations, strict=True))
            variance = left / (count * (count - 2)) + slope**2 * control.variance
    # A standard error from few requests is uncertain itself. Student's t has so much more variance.
    freedom = count - 1
    return excess, math.sqrt(variance * (freedom / (freedom - 2) if freedom > 2 else _FEW_FACTOR))


def _rate(nats: Sequence[float], sizes: Sequence[int]) -> tuple[float, list[float]]:
    """Nats per byte of requests, and what each adds to its error by linearisation (Cochran, 6)."""
    rate, mean_size = math.fsum(nats) / sum(sizes), sum(sizes) / len(sizes)
    return rate, [(one - rate * size) / mean_size for one, size in zip(nats, sizes, strict=True)]


def _batch(one: ExitProfile, worker: WorkerView, situation: Situation) -> int:
    """Sequences that the memory left by the weights holds, each at the middle of its life."""
    if worker.memory_bytes is None:
        return worker.max_running
    context = situation.prompt_tokens + situation.output_tokens / 2
    free = worker.memory_bytes - one.weight_bytes
    return max(0, min(worker.max_running, int(free / (one.kv_bytes_per_token * context))))


def _cost(plan: Plan, one: ExitProfile, workers: Sequence[WorkerView], before: Plan | None) -> float:
    """Seconds that a move takes of one worker: the load, and the prefill anew of what is in flight."""
    kept = before.depth if before is not None and plan.model == before.model else 0
    if plan.depth <= kept:
        # Nothing is loaded, and what the lower layers have cached stays valid.
        return 0.0
    in_flight = sum(worker.tokens_in_flight for worker in workers) / len(workers)
    # The layers that it has are not loaded again.
    return one.load_seconds * (1 - kept / plan.depth) + in_flight / one.prefill_tokens_per_second


def _refusals(
    option: Option,
    increases: Sequence[_Increase],
    profile: ModelProfile,
    one: ExitProfile,
    situation: Situation,
    settings: PolicySettings,
    before: Plan | None,
) -> dict[str, str]:
    """The bounds that an option breaks, by name, in words."""
    slo = situation.slo
    found: dict[str, str] = {}

    def check(
        bound: str, value: float, limit: float | None, *, at_least: bool = False, noise: float = 0.0
    ) -> None:
        if limit is not None and (value < limit if at_least else value - noise > limit):
            side = "below" if at_least else "above"
            by = f" by more than noise, {noise:.2g}" if noise else ""
            found[bound] = f"{bound}: {value:.4g} is {side} {limit:.4g}{by}"

    # What is in force goes only when it is beyond the bound by more than noise. How its model compares with
    # others is no reason against another depth of it: that must be within the bound over its own last layer.
    stays, same_model = option.plan == before, before is not None and option.model == before.model
    tolerated = [
        (increase, (settings.leave_sigmas if is_own else settings.stay_sigmas) * (error or 0.0))
        if stays or (same_model and not is_own)
        else (increase, 0.0)
        for increase, error, is_own in increases
    ]
    increase, noise = max(tolerated, key=lambda one: one[0] - one[1])
    check(_QUALITY, increase, slo.max_perplexity_increase, noise=noise)
    check("min_agreement", option.agreement, slo.min_agreement, at_least=True)
    check("min_exit_share", option.exit_share, settings.min_exit_share, at_least=True)
    check("max_ttft_seconds", option.ttft_seconds, slo.max_ttft_seconds)
    check("max_tpot_seconds", option.tpot_seconds, slo.max_tpot_seconds)
    if option.batch < 1:
        found["memory"] = f"memory: {one.weight_bytes:,} bytes of weights leave no room for a sequence"
    if slo.objective is Objective.ENERGY and one.joules_per_token is None:
        found["energy"] = (
            "energy: unknown, no power meter is readable where it was profiled; configure the profiler's "
            "power figure or choose another objective"
        )
    workers = situation.free or situation.workers
    if any(worker.tokenizer_id != profile.tokenizer_id for worker in workers):
        found["tokenizer"] = "tokenizer: another than that of the streams in flight"
    for bar in situation.bars:
        if bar.covers(profile, one.depth):
            found["bar"] = f"{bar.reason}; out until {profile.model} is profiled anew"
    if before is not None and option.plan != before and not _allowed(option, before, settings.moves):
        found["moves"] = f"moves: only {settings.moves} is allowed"
    return found


def _allowed(option: Option, before: Plan, moves: Moves) -> bool:
    same = option.model == before.model
    return moves is Moves.BOTH or same is (moves is Moves.DEEPEN)


def _answer_breach(
    weighed: Sequence[_Weighed], before: Plan, situation: Situation, settings: PolicySettings
) -> tuple[Plan | None, str]:
    """The cheaper of deeper and switch: time of the next interval's tokens, and of the move itself."""
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

    def seconds(one: _Weighed) -> float:
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


def _excuse(weighed: Sequence[_Weighed], before: Plan | None, plan: Plan | None, situation: Situation) -> str:
    """Why a plan stays whose perplexity was measured beyond the bound; empty when it was not."""
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


def _retreat(weighed: Sequence[_Weighed], before: Plan) -> tuple[Plan, str]:
    """The plan that is best in quality by all that was ever measured: until the new traffic is evaluated."""
    said = "the traffic has changed and is not evaluated yet"
    known = [one for one in weighed if one.eligible]
    known = known or [one for one in weighed if set(one.refusals) <= {_QUALITY, "min_agreement"}]
    if not known:
        return before, f"{said}; {before} stays, no other plan is possible"
    safest = min(known, key=lambda one: (one.option.perplexity_increase, -one.option.depth, one.option.model))
    if safest.option.plan == before:
        return before, f"{said}; {before} stays, it is the safest plan known"
    return safest.option.plan, f"{said}; {safest.option.plan} is the safest plan known"


def _undecided(
    weighed: Sequence[_Weighed], plan: Plan | None, slo: Slo, settings: PolicySettings
) -> tuple[str, ...]:
    """Models of which more requests should be evaluated, since chance may have decided; none: it is settled.

    The plan that was chosen may be beyond the bound on perplexity, or a cheaper one within it.
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
        if matters and doubtful and set(one.refusals) <= {_QUALITY}:
            found.add(option.model)
    # All others are measured against the best at full depth.
    if found:
        found |= {
            one.option.model
            for one in weighed
            if any(increase == 0 for increase, _, _ in one.increases)
            and not one.is_surely_beyond(0.0, settings.decide_sigmas)
        }
    return tuple(sorted(found))


def _best(
    weighed: Sequence[_Weighed], before: Plan | None, situation: Situation, settings: PolicySettings
) -> tuple[Plan | None, str]:
    """The best option by the SLO, with hysteresis for the plan in force."""
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
    # The operator has just asked for something else, or nobody has chosen the plan in force.
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
    weighed: Sequence[_Weighed], before: Plan | None, slo: Slo, settings: PolicySettings
) -> list[_Weighed]:
    """Options within the bounds. A new one keeps a distance from them where one can: what is at the very
    bound would be in with one measurement and out with the next."""
    share = 1 - settings.bound_margin

    def is_safe(option: Option) -> bool:
        # Where its error is known, a perplexity has a margin on the other side, `leave_sigmas`.
        is_noisy = option.perplexity_increase_error is None
        # Each as a distance from perfect, so that one comparison does for ceilings and floors.
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

        def is_sure(one: _Weighed) -> bool:
            if before is not None and one.option.model == before.model:
                return one.is_surely_within(bound, settings.enter_sigmas, None)
            switch_sigmas = settings.switch_sigmas if stays else settings.enter_sigmas
            return one.is_surely_within(bound, settings.enter_sigmas, switch_sigmas)

        # A new plan is within the bound by more than chance, if there is such a one.
        eligible = [one for one in eligible if one.option.plan == before or is_sure(one)] or eligible
    return [one for one in eligible if one.option.plan == before or is_safe(one.option)] or eligible


def _smallest_depths(weighed: Sequence[_Weighed]) -> list[_Weighed]:
    """The smallest depth of each model; options come with depths ascending."""
    smallest: dict[str, _Weighed] = {}
    for one in weighed:
        smallest.setdefault(one.option.model, one)
    return list(smallest.values())


def _rank(option: Option, before: Plan | None) -> tuple[float, float, bool, str, int]:
    """Order of options: by the objective, then the faster, then the one in force, then by name."""
    return option.loss, -option.tokens_per_second, option.plan != before, option.model, option.depth
