"""Fixtures for every test: tiny models, Redis, and factories for workers and gateways as processes."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.stack import Process, Stack, start_redis, write_tiny_models

# Tiny products gain nothing from a second thread, and are much slower with one when the cores are busy. torch
# reads this at its first import, so it is set here, before the test modules are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a shared machine the time of an example means nothing, so it has no deadline.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell starts background processes with SIGINT ignored. Without this, children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with the random models `tiny`, `other` and `long` (tests/stack.py)."""
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """The URL of a real Redis server that lives as long as the test."""
    process, url = start_redis(tmp_path)
    yield url
    process.kill()


@pytest.fixture
def stack(tmp_path: Path, tiny_models: Path) -> Iterator[Stack]:
    """A stack without parts. At its end it ends every process that the test started."""
    parts = Stack(tmp_path, tiny_models)
    yield parts
    parts.close()


@pytest.fixture
def start_worker(stack: Stack) -> Callable[..., Process]:
    """Starts a worker: `start_worker(model="tiny", depth=4, **settings)`."""
    return stack.start_worker


@pytest.fixture
def start_gateway(stack: Stack) -> Callable[..., Process]:
    """Starts a gateway: `start_gateway(workers=[worker.address], **settings)`."""
    return stack.start_gateway
