"""Settings that cannot work are refused by name before anything starts."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--workers", "127.0.0.1"], "workers: '127.0.0.1' is not HOST:PORT: it needs a port"),
        (["--max-tokens", "64"], "default_max_tokens must not be above max_tokens"),
        (["--telemetry-seconds", "5"], "telemetry_seconds must be below worker_timeout_seconds"),
        (["--max-open-streams", "0"], "max_open_streams: Input should be greater than or equal to 1"),
        (["--address", "127.0.0.1:none"], "address: '127.0.0.1:none' is not HOST:PORT"),
    ],
)
def test_a_wrong_setting_ends_the_gateway_with_its_name(flags: list[str], problem: str) -> None:
    command = [sys.executable, "-m", "services.gateway", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: wrong settings: ")
    assert problem in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
