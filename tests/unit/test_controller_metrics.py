"""The figures of the router that the controller sends with its metrics."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry.metrics import CallbackOptions

from helios import telemetry
from helios.v1 import controller_pb2
from services.controller.metrics import observe_router
from services.controller.routing.request_routing import RequestRouting


def test_the_router_is_measured_once_workers_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gauges: dict[str, Callable[[CallbackOptions], list[Any]]] = {}

    def create(name: str, callbacks: list[Callable[[CallbackOptions], list[Any]]], *_: object) -> None:
        gauges[name.removeprefix("helios.controller.router.")] = callbacks[0]

    monkeypatch.setattr(telemetry, "meter", lambda: SimpleNamespace(create_observable_gauge=create))
    state: controller_pb2.RouterState | None = None
    # Only the part that the metrics read.
    observe_router(cast("RequestRouting", SimpleNamespace(state=lambda: state)))

    def read(name: str) -> list[tuple[float, dict[str, object]]]:
        return [(one.value, dict(one.attributes or {})) for one in gauges[name](CallbackOptions())]

    assert not any(read(name) for name in gauges)
    state = controller_pb2.RouterState(examples=8)
    assert not any(read(name) for name in gauges)
    state = controller_pb2.RouterState(number=3, examples=60, price=1e-4, bound=0.045, expected_increase=0.02)
    state.shares.add(model="prose", depth=6, share=0.75)
    assert (read("number"), read("examples"), read("increase")) == ([(3, {})], [(60, {})], [(0.02, {})])
    assert not read("surprise"), "too few prompts were read"
    state.served_surprise = -0.1
    assert read("surprise") == [(-0.1, {})]
    assert read("share") == [(0.75, {"helios.model": "prose", "helios.depth": 6})]
