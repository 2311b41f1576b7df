"""The bounds that an option must keep: from the SLO, the operator's settings, and the workers."""

from collections.abc import Sequence

from helios.history import ExitProfile, ModelProfile
from helios.served import ServedPlan
from helios.slo import Objective
from services.controller.decision import Option
from services.controller.policy.perplexity import Increase
from services.controller.policy.settings import Moves, PolicySettings
from services.controller.situation import Situation

QUALITY = "max_perplexity_increase"


def refusals_of(
    option: Option,
    increases: Sequence[Increase],
    profile: ModelProfile,
    one: ExitProfile,
    situation: Situation,
    settings: PolicySettings,
    before: ServedPlan | None,
) -> dict[str, str]:
    """The bounds that an option breaks. Maps each bound's name to a text."""
    slo = situation.slo
    found: dict[str, str] = {}

    def check(
        bound: str, value: float, limit: float | None, *, at_least: bool = False, noise: float = 0.0
    ) -> None:
        if limit is not None and (value < limit if at_least else value - noise > limit):
            side = "below" if at_least else "above"
            by = f" by more than noise, {noise:.2g}" if noise else ""
            found[bound] = f"{bound}: {value:.4g} is {side} {limit:.4g}{by}"

    # The plan in force is refused only if it exceeds the bound by more than noise. Another depth of the same
    # model gets this tolerance against other models, but none against its own last layer.
    stays, same_model = option.plan == before, before is not None and option.model == before.model
    tolerated = [
        (increase, (settings.leave_sigmas if is_own else settings.stay_sigmas) * (error or 0.0))
        if stays or (same_model and not is_own)
        else (increase, 0.0)
        for increase, error, is_own in increases
    ]
    increase, noise = max(tolerated, key=lambda one: one[0] - one[1])
    check(QUALITY, increase, slo.max_perplexity_increase, noise=noise)
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


def _allowed(option: Option, before: ServedPlan, moves: Moves) -> bool:
    same = option.model == before.model
    return moves is Moves.BOTH or same is (moves is Moves.DEEPEN)
