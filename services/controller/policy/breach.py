"""When a worker's plan counts as breached, by the paper's confidence breach counter (CBC)."""

import math

from helios.history import ModelProfile
from services.controller.policy.options import exit_share
from services.controller.policy.settings import PolicySettings
from services.controller.situation import WorkerView


def breach_limit(worker: WorkerView, profile: ModelProfile | None, settings: PolicySettings) -> int:
    """The fewest high-exit tokens in a window at which the worker's plan counts as breached.

    This is the setting `breach_limit`, unless the profile already expects about as many. A breach means that
    the traffic no longer matches the profile, not that an exit is generally unsure (spec, insight 2).
    """
    expected = 0.0
    if profile is not None and profile.find_exit(worker.depth) is not None:
        # Even a profile without unsure tokens allows for three in as many tokens as it has (the rule of
        # three).
        expected = max(1 - exit_share(profile, worker.depth, worker.threshold), 3 / max(profile.tokens, 3))
    mean = expected * settings.window_tokens
    noise = settings.breach_sigmas * math.sqrt(mean * (1 - expected))
    # Always above the expected count, even if the profile expects that no token is sure.
    return max(settings.breach_limit, math.floor(mean + noise) + 1)


def is_breached(worker: WorkerView, profile: ModelProfile | None, settings: PolicySettings) -> bool:
    """Whether the worker's confidence breach counter has reached its limit in a full window."""
    return _counter(worker, settings) >= breach_limit(worker, profile, settings)


def _counter(worker: WorkerView, settings: PolicySettings) -> float:
    """High-exit tokens, scaled to a window of `window_tokens`. 0 while the window is not full."""
    if worker.window_tokens < settings.window_tokens:
        return 0.0
    return worker.window_high_exit_tokens * settings.window_tokens / worker.window_tokens
