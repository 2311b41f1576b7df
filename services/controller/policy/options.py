"""The options: each profiled depth of each candidate, with expected figures and broken bounds."""

from collections.abc import Iterator, Mapping, Sequence

from helios.history import ExitProfile, ModelProfile
from helios.served import ServedPlan
from helios.slo import Objective
from services.controller.decision import Option
from services.controller.policy.bounds import refusals_of
from services.controller.policy.perplexity import Control, Increase, increases_of
from services.controller.policy.settings import PolicySettings
from services.controller.situation import Situation, WorkerView


class Weighed:
    """An option, and the bounds that it breaks."""

    def __init__(
        self,
        option: Option,
        refusals: Mapping[str, str],
        increases: Sequence[Increase],
    ) -> None:
        """`refusals` maps the name of each broken bound to a text. `increases` are those of perplexity."""
        self.option = option
        self.refusals = dict(refusals)
        self.increases = increases
        # Why an option within the bounds was not chosen. It goes into the record.
        self.note = ""
        # Requests for which it is passed over, because another plan was chosen recently. None: it is not.
        self.dwell_left: int | None = None

    @property
    def eligible(self) -> bool:
        """Whether it breaks no bound."""
        return not self.refusals

    def is_surely_within(self, bound: float, sigmas: float, switch_sigmas: float | None) -> bool:
        """Whether its perplexity is within the bound by more than chance, whichever candidate is the best.

        sigmas: standard errors against the option's own model; switch_sigmas: against other models. None:
        those do not count.
        """
        return all(
            increase + (sigmas if is_own else switch_sigmas or 0.0) * (error or 0.0) <= bound
            for increase, error, is_own in self.increases
            if is_own or switch_sigmas is not None
        )

    def is_surely_beyond(self, bound: float, sigmas: float) -> bool:
        """Whether its perplexity exceeds the bound by more than chance."""
        return any(increase - sigmas * (error or 0.0) > bound for increase, error, _ in self.increases)

    def explained(self, chosen: ServedPlan | None) -> Option:
        """The option for the record, with the reason why it was not `chosen`."""
        said = "" if self.option.plan == chosen else self.note
        return self.option.model_copy(update={"refused": "; ".join(self.refusals.values()) or said})


def exit_share(profile: ModelProfile, depth: int, threshold: float | None = None) -> float:
    """Share of tokens that are sure at a depth with this threshold. None: the profile's own threshold.

    At the last layer every token counts as sure.
    """
    one = profile.at(depth)
    if one is profile.full:
        return 1.0
    return one.share_above(one.threshold if threshold is None else threshold)


def weigh(situation: Situation, settings: PolicySettings, before: ServedPlan | None) -> Iterator[Weighed]:
    """Considers every profiled depth of every candidate. A model's depths come in ascending order."""
    known = [situation.history[name] for name in situation.candidates if name in situation.history]
    if not known or not situation.workers:
        return
    control = Control.of(situation)
    for profile in known:
        for one in profile.exits:
            increases = increases_of(profile, one, known, control)
            option = _expect(profile, one, increases, situation, settings, before)
            refusals = refusals_of(option, increases, profile, one, situation, settings, before)
            yield Weighed(option, refusals, increases)


def _expect(
    profile: ModelProfile,
    one: ExitProfile,
    increases: Sequence[Increase],
    situation: Situation,
    settings: PolicySettings,
    before: ServedPlan | None,
) -> Option:
    workers = situation.free or situation.workers
    context = situation.prompt_tokens + situation.output_tokens / 2
    batch = min(
        most_sequences(worker, one.weight_bytes, one.kv_bytes_per_token * context) for worker in workers
    )
    in_flight = sum(worker.running + worker.waiting for worker in workers)
    load = max(1, min(-(-in_flight // len(workers)), batch))
    tpot = one.step_seconds(load)
    # Measured for a single request. At a loaded worker, the step in progress must end first.
    ttft = one.ttft_seconds + (tpot if load > 1 else 0.0)
    # If memory holds no sequence, the option is refused. Its figures are then those of one sequence.
    token_seconds = seconds_per_token(one, max(1, batch), situation.prompt_tokens, situation.output_tokens)
    # The largest rise is the one over the best candidate.
    increase, error, _ = max(increases, key=lambda one: one[0])
    plan = ServedPlan(model=profile.model, depth=one.depth)
    cost = _cost(plan, one, workers, before)
    horizon_tokens = settings.reassess_requests * situation.output_tokens / len(workers)
    response = tpot + ttft / situation.output_tokens
    losses = {
        Objective.THROUGHPUT: token_seconds + cost / horizon_tokens,
        Objective.LATENCY: response + cost / horizon_tokens,
        # A reload draws about as much power as serving.
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


def most_sequences(worker: WorkerView, weight_bytes: int, sequence_bytes: float) -> int:
    """How many sequences with KV of this size fit into the memory that the weights leave."""
    if worker.memory_bytes is None:
        return worker.max_running
    free = worker.memory_bytes - weight_bytes
    return max(0, min(worker.max_running, int(free / sequence_bytes)))


def seconds_per_token(one: ExitProfile, batch: int, prompt_tokens: float, output_tokens: float) -> float:
    """Seconds of a generated token in a batch, with its share of the prefill of new requests."""
    prefill = prompt_tokens / output_tokens / one.prefill_tokens_per_second
    return one.step_seconds(batch) / batch + prefill


def _cost(
    plan: ServedPlan, one: ExitProfile, workers: Sequence[WorkerView], before: ServedPlan | None
) -> float:
    """Seconds that a move costs one worker: the load, and a new prefill of the sequences in flight."""
    kept = before.depth if before is not None and plan.model == before.model else 0
    if plan.depth <= kept:
        # Nothing is loaded, and the KV of the lower layers stays valid.
        return 0.0
    in_flight = sum(worker.tokens_in_flight for worker in workers) / len(workers)
    # Layers that the worker already has are not loaded again.
    return one.load_seconds * (1 - kept / plan.depth) + in_flight / one.prefill_tokens_per_second
