"""A running stack that well-behaved integration tests share."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from helios.client import AsyncClient
from tests.stack import Process, Stack


@pytest.fixture(scope="session")
def served_stack(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Stack]:
    """Redis, a worker with `tiny` at full depth, and a gateway (the last process). Tests must not harm it."""
    parts = Stack(tmp_path_factory.mktemp("served"), tiny_models)
    try:
        parts.start_redis()
        parts.start_worker(worker_id="served-worker")
        parts.start_gateway(telemetry_seconds=0.05, discovery_seconds=0.1)
        yield parts
    finally:
        parts.close()


@pytest.fixture(scope="session")
def long_worker(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Process]:
    """A worker with the model `long`, for tests with their own gateway. Its streams last about a second."""
    parts = Stack(tmp_path_factory.mktemp("long"), tiny_models)
    try:
        yield parts.start_worker(model="long", worker_id="long-worker")
    finally:
        parts.close()


@pytest.fixture
def gateway(served_stack: Stack) -> Process:
    """The shared stack's gateway."""
    return served_stack.processes[-1]


@pytest.fixture
async def client(gateway: Process) -> AsyncIterator[AsyncClient]:
    """A connection to the shared stack's gateway."""
    async with AsyncClient(gateway.address) as connection:
        yield connection
