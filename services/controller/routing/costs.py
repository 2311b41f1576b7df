"""What plans and probes cost, from profiles. Pure."""

from collections.abc import Iterable, Mapping

import numpy as np

from helios.history import ModelProfile
from helios.routing.knowledge import PlanCost, ProbeCost
from helios.routing.probe import PROBE_READINGS
from helios.served import ServedPlan
from helios.slo import Objective
from services.controller.policy.options import seconds_per_token


def plan_cost(
    profile: ModelProfile,
    plan: ServedPlan,
    *,
    batch: int,
    load: int,
    prompt_tokens: float,
    output_tokens: float,
    objective: Objective,
) -> PlanCost:
    """The seconds of a token under a plan.

    batch: sequences of a full batch; load: those of the present one. With the objective LATENCY, the seconds
    are those at the present load.
    """
    one = profile.at(plan.depth)
    latency = one.step_seconds(max(1, min(load, batch)))
    full = seconds_per_token(one, max(1, batch), prompt_tokens, output_tokens)
    return PlanCost(
        model=plan.model,
        depth=plan.depth,
        seconds=latency if objective is Objective.LATENCY else full,
        latency_seconds=latency,
    )


def probe_cost(profiles: Iterable[ModelProfile], probe_tokens: float) -> ProbeCost:
    """The seconds of a probe of so many tokens, a mean over the models.

    For the model that is probed first, only the reading: its layers need not be computed again.
    """
    reads, computes = [], []
    for profile in profiles:
        reads.append(PROBE_READINGS * head_seconds(profile))
        computes.append(probe_tokens / profile.exits[0].prefill_tokens_per_second)
    first = float(np.mean(reads))
    return ProbeCost(first_seconds=first, further_seconds=first + float(np.mean(computes)))


def head_seconds(profile: ModelProfile) -> float:
    """Estimates the seconds of a row's LM head: a step's time per row at depth 0, by a line through exits."""
    depths = np.array([one.depth for one in profile.exits], dtype=float)
    rows = np.array([one.decode[-1].step_seconds / one.decode[-1].batch for one in profile.exits])
    if len(depths) == 1:
        # Nothing tells the head from the layers, so it counts as one more of them.
        return float(rows[0] / (depths[0] + 1))
    _, intercept = np.polyfit(depths, rows, 1)
    return max(0.0, float(intercept))


def quickest_within(
    increases: Mapping[ServedPlan, float], seconds: Mapping[ServedPlan, float], allowed: float
) -> ServedPlan:
    """The quickest plan whose increase (nats) is at most `allowed`. If there is none, the best one."""
    within = [plan for plan, increase in increases.items() if increase <= allowed]
    if not within:
        return min(increases, key=lambda plan: increases[plan])
    return min(within, key=lambda plan: seconds[plan])
