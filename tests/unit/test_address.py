"""A wrong address is refused at once, and the message says how to write it."""

import subprocess
import sys

import pytest

from helios.address import parse
from helios.errors import SettingsError
from helios.server import Server
from services.gateway.settings import GatewaySettings
from services.profiler.settings import ProfilerSettings
from services.worker.settings import WorkerSettings


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("gateway:1", ("gateway", 1)),
        ("helios_gateway.example.com:65535", ("helios_gateway.example.com", 65535)),
        ("[::1]:50051", ("[::1]", 50051)),
    ],
)
def test_address_has_a_host_and_a_port(address: str, parts: tuple[str, int]) -> None:
    assert parse(address) == parts


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("", "must not be empty"),
        ("http://gateway:50051", "leave out http://, as in gateway:50051"),
        ("https://gateway:50051/", "leave out https://, as in gateway:50051"),
        ("http://gateway", "leave out http://, as in gateway:50051"),
        ("http://", "leave out http://, as in 127.0.0.1:50051"),
        ("gateway", "it needs a port, as in gateway:50051"),
        ("[::1]", "it needs a port, as in [::1]:50051"),
        (":50051", "it needs a host, as in 127.0.0.1:50051"),
        ("::1:50051", "needs brackets, as in [::1]:50051"),
        ("gateway:", "a number from 1 to 65535, not ''"),
        ("gateway:http", "a number from 1 to 65535, not 'http'"),
        ("gateway:0", "a number from 1 to 65535, not '0'"),
        ("gateway:-1", "a number from 1 to 65535, not '-1'"),
        ("gateway:65536", "a number from 1 to 65535, not '65536'"),
        ("gateway:\u00b2", "a number from 1 to 65535"),
        ("gate way:1", "'gate way' is not the name or IP address of a host"),
        (" gateway:1", "' gateway' is not the name"),
        ("user@gateway:1", "'user@gateway' is not the name"),
        ("gateway/path", "'gateway/path' is not the name"),
    ],
)
def test_what_is_no_address_is_refused_with_a_hint(address: str, hint: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT") as refused:
        parse(address)
    assert hint in str(refused.value)


def test_port_0_is_for_servers_only() -> None:
    assert parse("127.0.0.1:0", any_port=True) == ("127.0.0.1", 0)
    with pytest.raises(ValueError, match="from 0 to 65535, not '65536'"):
        parse("127.0.0.1:65536", any_port=True)


@pytest.mark.parametrize("settings", [GatewaySettings, ProfilerSettings, WorkerSettings])
@pytest.mark.parametrize("address", ["here", "http://here:1", "here:99999"])
def test_service_refuses_to_listen_on_what_is_no_address(
    settings: type[GatewaySettings | ProfilerSettings | WorkerSettings], address: str
) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        settings(address=address)


async def test_no_server_listens_on_what_is_no_address() -> None:
    with pytest.raises(SettingsError, match="cannot listen: 'here' is not HOST:PORT"):
        Server([]).bind("here")


def test_worker_advertises_a_host_or_an_address() -> None:
    assert WorkerSettings(advertise="worker-0").advertise == "worker-0"
    assert WorkerSettings(advertise="worker-0:50061").advertise == "worker-0:50061"
    for wrong in ("http://worker-0", "worker-0:", "worker 0"):
        with pytest.raises(ValueError, match="is not HOST:PORT"):
            WorkerSettings(advertise=wrong)


def test_health_check_of_what_is_no_address_is_wrong_usage() -> None:
    command = [sys.executable, "-m", "helios.health", "http://127.0.0.1:1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "leave out http://, as in 127.0.0.1:1" in ran.stderr
