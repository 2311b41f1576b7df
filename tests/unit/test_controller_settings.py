"""The controller's settings include the policy's. Settings that contradict each other are refused."""

import pytest
from pydantic import ValidationError

from helios.slo import Objective, Slo
from services.controller.policy.settings import Moves, PolicySettings
from services.controller.settings import ControllerSettings


def test_policy_and_slo_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOS_CONTROLLER_MOVES", "deepen")
    monkeypatch.setenv("HELIOS_CONTROLLER_REASSESS_REQUESTS", "50")
    monkeypatch.setenv("HELIOS_CONTROLLER_OBJECTIVE", "latency")
    monkeypatch.setenv("HELIOS_CONTROLLER_MAX_PERPLEXITY_INCREASE", "0.01")
    settings = ControllerSettings()
    assert settings.policy == PolicySettings(moves=Moves.DEEPEN, reassess_requests=50)
    assert settings.slo == Slo(Objective.LATENCY, 0.01)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"breach_limit": 101}, "breach_limit must not be above window_tokens"),
        ({"telemetry_seconds": 5.0}, "telemetry_seconds must be below worker_timeout_seconds"),
        ({"min_gain": 1.0}, "min_gain"),
        ({"mode": "maybe"}, "advisory"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ControllerSettings(**fields)
