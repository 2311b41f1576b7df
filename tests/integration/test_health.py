"""The container's health check reports the status of the server's health service."""

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

from helios.server import Server
from tests.stack import free_port

SERVICE = "helios.v1.InferenceService"


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    """A server that serves, and its address."""
    server = Server([SERVICE])
    address = f"127.0.0.1:{server.bind('127.0.0.1:0')}"
    await server.start()
    yield server, address
    await server.stop(0)


async def health(*arguments: str) -> tuple[int | None, str]:
    """Exit status and stderr of the check."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "helios.health", *arguments), stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    return process.returncode, errors.decode()


@pytest.mark.parametrize("arguments", [[], ["--service", SERVICE]])
async def test_serving_server_is_healthy(server: tuple[Server, str], arguments: list[str]) -> None:
    assert await health(server[1], *arguments) == (0, "")


async def test_server_that_says_it_does_not_serve_is_unhealthy(server: tuple[Server, str]) -> None:
    await server[0].set_serving(False)

    assert await health(server[1]) == (1, f"{server[1]} answers NOT_SERVING\n")


async def test_unknown_service_is_unhealthy(server: tuple[Server, str]) -> None:
    status, errors = await health(server[1], "--service", "helios.v1.Nothing")

    assert status == 1
    assert "NOT_FOUND" in errors


async def test_nobody_there_is_unhealthy() -> None:
    address = f"127.0.0.1:{free_port()}"

    status, errors = await health(address, "--timeout", "1")

    assert status == 1
    assert errors.startswith(f"{address}: ")
