"""Which channels use the proxy that the environment names."""

import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helios import channel
from helios.channel import is_on_this_machine
from helios.client import AsyncClient, Client, generate_request
from helios.errors import HeliosError, UnavailableError
from helios.server import Server
from tests.stack import free_port

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
# This address is reserved for documentation (RFC 5737), so no machine has it.
ELSEWHERE = "192.0.2.1:50051"
SECONDS = 10.0


@pytest.fixture(autouse=True)
def no_proxy_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=VARIABLES)
def dead_proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets a proxy variable to a port on which nothing listens."""
    monkeypatch.setenv(request.param, f"http://127.0.0.1:{free_port()}")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The listening socket of the proxy that the environment names."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield listener


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """A server that answers health checks."""
    server = Server([])
    port = server.bind("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_a_service_reaches_another_without_the_proxy(dead_proxy: None, address: str) -> None:
    async with channel.to_service_async(address) as opened:
        answer = await health_pb2_grpc.HealthStub(opened).Check(
            health_pb2.HealthCheckRequest(), timeout=SECONDS
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "own name"])
async def test_a_client_reaches_its_own_machine_without_the_proxy(
    dead_proxy: None, address: str, host: str
) -> None:
    port = address.rpartition(":")[2]
    if host == "own name":
        host = socket.gethostname()
        if socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0] != "127.0.0.1":
            assert is_on_this_machine(f"{host}:{port}")
            pytest.skip("the server listens on loopback, which is not where this machine's name leads")
    async with AsyncClient(f"{host}:{port}") as client:
        with pytest.raises(HeliosError) as refused:
            await anext(client.generate(generate_request("a"), timeout_seconds=SECONDS))
    # The server was reached. It only is not a gateway.
    assert "Method not found" in refused.value.message


def test_a_client_reaches_another_machine_through_the_proxy(proxy: socket.socket) -> None:
    with Client(ELSEWHERE) as client, ThreadPoolExecutor(1) as thread:
        asked = thread.submit(client.status, timeout_seconds=SECONDS)
        connection, _ = proxy.accept()
        with connection:
            connection.settimeout(SECONDS)
            assert connection.recv(4096).startswith(f"CONNECT {ELSEWHERE} HTTP/1.1".encode())
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        with pytest.raises(HeliosError):
            asked.result()


def test_a_service_does_not_ask_the_proxy_for_another_machine(proxy: socket.socket) -> None:
    with channel.to_service(ELSEWHERE) as opened, pytest.raises(grpc.RpcError):
        health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=0.5)
    proxy.setblocking(False)
    with pytest.raises(BlockingIOError):
        proxy.accept()


def test_a_dead_proxy_is_named_by_the_error_of_a_client(dead_proxy: None) -> None:
    with Client(ELSEWHERE) as client, pytest.raises(UnavailableError, match=ELSEWHERE):
        client.status(timeout_seconds=SECONDS)


@pytest.mark.parametrize(
    "target",
    [
        "localhost:1",
        "LOCALHOST:1",
        "a.localhost:1",
        "127.0.0.1:1",
        "127.8.8.8:1",
        "[::1]:1",
        "0.0.0.0:1",
        "dns:///localhost:1",
        "dns://8.8.8.8/localhost:1",
        "ipv4:127.0.0.1:1",
        "ipv6:[::1]:1",
        "unix:/tmp/socket",
        f"{socket.gethostname()}:1",
    ],
)
def test_targets_on_this_machine_are_known(target: str) -> None:
    assert is_on_this_machine(target)


@pytest.mark.parametrize(
    "target",
    [ELSEWHERE, "example.org:1", "dns:///example.org:1", "[2001:db8::1]:1", "localhost.example.org:1", ""],
)
def test_other_targets_leave_it(target: str) -> None:
    assert not is_on_this_machine(target)
