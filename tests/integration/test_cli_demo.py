"""`helios demo`, and the output of `helios status` and `top` when a part of the stack is gone."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.demo.stack import default_orders
from helios.controller_client import connect
from helios.slo import Objective, Slo
from tests.integration.test_cli_stack import Helios, eventually

# The demo starts four stacks, one after the other.
DEMO_SECONDS = 500.0


@pytest.fixture
def helios(tmp_path: Path, tiny_models: Path) -> Iterator[Helios]:
    """A stack that is not running yet. If the test starts it, it is stopped at the end."""
    command = Helios(tmp_path / "state", tiny_models)
    yield command
    command.run("down")


def demo(helios: Helios, *options: str) -> "subprocess.CompletedProcess[str]":
    """`helios demo` over the tiny models."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HELIOS_", "OTEL_"))}
    own = {
        "HELIOS_STATE_DIR": str(helios.state_dir),
        "HELIOS_MODELS_DIR": str(helios.models_dir),
        # Otherwise all tokens of such a small model would come in one message.
        "HELIOS_WORKER_BURST_SECONDS": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", "helios.cli", "demo", *options],
        env=clean | own,
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS,
        check=False,
    )


@pytest.mark.timeout(DEMO_SECONDS + 60)
def test_demo_without_a_stack_shows_drift_decisions_and_every_system(helios: Helios, tmp_path: Path) -> None:
    picture, out = tmp_path / "timeline.png", tmp_path / "demo.json"
    shown = demo(helios, "--seconds", "9", "--picture", str(picture), "--json", str(out))
    assert shown.returncode == 0, shown.stderr
    assert "starts one of its own" in shown.stdout
    systems = ("full", "dynamic", "single plan", "HELIOS")
    for part in ("prose", "technical", "mix", *systems, "decisions", str(picture)):
        assert part in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")

    content = json.loads(out.read_text())
    assert [target["name"] for target in content["targets"]] == [
        "perplexity over the first 32 requests of each phase",
        "tokens in windows within the bound (of at least 1 s and 16 judged requests), the worst phase",
        "throughput against full, all phases",
    ]
    assert content["machine"]["cores"] >= 1
    results: dict[str, Any] = content["results"]
    rows = {(row["system"], row["phase"]): row for row in results["rows"]}
    phases = ("prose", "technical", "mix", "all")
    assert set(rows) == {(system, phase) for system in systems for phase in phases}
    for row in rows.values():
        assert (row["failed"], row["errors"]) == (0, [])
        assert row["tokens_per_second"] > 0
        assert 0 < row["tpot_ms"]["p50"] <= row["tpot_ms"]["p99"]
        assert row["perplexity_increase"] > -1
        assert 0 <= row["within_bound"] <= 1
    assert set(results["best"]) == set(phases[:3])
    assert set(results["timelines"]) == {"single plan", "HELIOS"}
    for timeline in results["timelines"].values():
        assert [name for name, _, _ in timeline["phases"]] == list(phases[:3])
        assert {sample["phase"] for sample in timeline["samples"]} == set(phases[:3])
        assert {worker["worker_id"] for sample in timeline["samples"] for worker in sample["workers"]}
        # Each request is in one window, at the time at which it was opened.
        for name, began, ended in timeline["phases"]:
            of_phase = [window for window in timeline["windows"] if window["phase"] == name]
            assert all(began <= window["began"] <= ended for window in of_phase)
            assert all(
                sum(one["share"] for one in window["shares"]) == pytest.approx(1) for window in of_phase
            )
    # The demo has stopped its own stack.
    assert helios.run("status").stderr.startswith("error: no running stack found")


def test_demo_leaves_objective_and_pins_as_they_were(helios: Helios) -> None:
    assert helios.up("--controller", "active").returncode == 0
    ordered = Slo(Objective.LATENCY, 0.02, max_ttft_seconds=30.0)
    with connect(helios.state()["controller"]) as controller:
        eventually(lambda: is_leading(helios), "a leading controller")
        controller.set_slo(ordered.to_proto())
        controller.pin("tiny", 2, "")
        with default_orders(controller):
            during = controller.get_plan()
            assert Slo.from_proto(during.slo) == Slo()
            assert not any(one.pinned for one in during.plans)
        after = controller.get_plan()
    assert Slo.from_proto(after.slo) == ordered
    assert [(one.model, one.depth, one.pinned) for one in after.plans] == [("tiny", 2, True)]


def is_leading(helios: Helios) -> bool:
    status = json.loads(helios.run("status", "--json").stdout)
    return status["controller"] is not None and bool(status["controller"]["leading"])


def test_demo_refuses_a_stack_that_does_not_follow_traffic(helios: Helios) -> None:
    assert helios.up().returncode == 0
    refused = demo(helios)
    assert refused.returncode == 1
    assert "helios up --controller active" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_status_and_top_say_what_is_gone_and_that_the_last_plan_stays(helios: Helios) -> None:
    assert helios.up("--profiler", "--controller", "active").returncode == 0
    eventually(
        lambda: bool(status(helios)["controller"] and status(helios)["workers"][0]["exit_histogram"]),
        "a controller and a first profile",
    )
    known = status(helios)["workers"][0]["exit_histogram"]
    assert sum(known["confidence_counts"]) >= sum(known["agreement_counts"]) > 0
    assert "agree" in helios.run("status").stdout
    plan = [(one["model"], one["depth"]) for one in status(helios)["workers"]]

    # They are frozen and not killed, because the supervisor would start them again at once.
    processes = helios.state()["processes"]
    for name in ("controller", "profiler"):
        os.kill(processes[name], signal.SIGSTOP)
    try:
        left = status(helios)
        assert [(one["model"], one["depth"]) for one in left["workers"]] == plan
        assert (left["controller"], left["slo"]) == (None, None)
        problems = " ".join(left["problems"])
        assert "controller: " in problems
        assert "the last plan stays" in problems
        assert "profiler: " in problems
        told = helios.run("top", "--once", "--interval", "0.2")
        assert told.returncode == 0, told.stderr
        assert "the last plan stays" in told.stdout
    finally:
        for name in ("controller", "profiler"):
            os.kill(processes[name], signal.SIGCONT)


def status(helios: Helios) -> dict[str, Any]:
    answer = helios.run("status", "--json")
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout))
