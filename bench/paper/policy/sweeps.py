"""Sweeps of the controller's settings, one at a time, on the same traces."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper.policy.hindsight import Hindsight, simulated
from bench.paper.policy.paper_setting import RULE, dynamic_rate
from services.controller.agenda import AgendaSettings
from services.controller.policy.settings import Moves

_SWEEPS: dict[str, tuple[float, ...]] = {
    "drift_delay_requests": (5, 10, 20),
    "false_alarms_per_day": (2, 24, 240),
    "follow_up_requests": (3, 6, 12),
    "most_follow_up_requests": (6, 12, 24),
    "leave_sigmas": (0, 0.2, 0.5),
}
_REASSESS_REQUESTS, _PROFILED_REQUESTS = (50, 150, 400), (5, 10, 20)
_RULE_SWEEPS: dict[str, tuple[int, ...]] = {
    "reassess_requests": (25, 50, 150, 250, 400),
    "breach_limit": (10, 25, 50, 100),
}
_THRESHOLDS = (None, 0.2, 0.5, 0.8, 0.9)


def ablation(traces: Sequence[Hindsight]) -> dict[str, Any]:
    """Simulates the controller without one of its parts, or with the paper's rule for drifts."""
    settings = _settings({})
    return {
        **{moves.value: simulated(traces, settings.model_copy(update={"moves": moves})) for moves in Moves},
        "both, only the last evaluation counts": simulated(traces, settings, pooled_requests=1),
        "both, the paper's rule": simulated(traces, _settings({"detection": "window"})),
        "both, the paper's rule, no reassessment put off": simulated(traces, _settings(RULE)),
    }


def sweeps(traces: Sequence[Hindsight]) -> dict[str, Any]:
    """Simulates several values of each setting of the controller."""
    return {
        # profiling_share 1 delays no reassessment. Otherwise the interval would have no effect.
        "reassess_requests": [
            {"value": value}
            | simulated(traces, _settings({"reassess_requests": value, "profiling_share": 1}))
            for value in _REASSESS_REQUESTS
        ],
        **{
            name: [{"value": value} | simulated(traces, _settings({name: value})) for value in values]
            for name, values in _SWEEPS.items()
        },
        "profiled_requests": [
            {"value": value} | simulated(traces, _settings({}), profiled_requests=value)
            for value in _PROFILED_REQUESTS
        ],
    }


def paper_sweeps(traces: Sequence[Hindsight], dynamic_model: str) -> dict[str, Any]:
    """Simulates several values of each setting of the paper's rule.

    The sweep of thresholds also has the speed of `dynamic_model` alone, with dynamic exits at that threshold.
    """
    return {
        **{
            name: [{"value": value} | simulated(traces, _settings({**RULE, name: value})) for value in values]
            for name, values in _RULE_SWEEPS.items()
        },
        "threshold": [
            {"value": "calibrated" if value is None else value}
            | simulated(traces, _settings(RULE), threshold=value)
            | {"dynamic_tokens_per_second": dynamic_rate(traces, dynamic_model, value)}
            for value in _THRESHOLDS
        ],
    }


def _settings(values: Mapping[str, Any]) -> AgendaSettings:
    """The default settings, except for these values."""
    return AgendaSettings.model_validate(values)
