"""`helios slo`, `pin`, `unpin`, `decisions` and `top` against a running stack with an active controller."""

import asyncio
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from helios import history
from tests.integration.test_cli_stack import Helios, eventually
from tests.profiles import exit_profile, model_profile
from tests.stack import free_port


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Helios]:
    """One worker with `tiny` at depth 4, whose profile says that depth 2 is as good."""
    command = Helios(tmp_path_factory.mktemp("state"), tiny_models)
    started = command.up("--controller", "active")
    assert started.returncode == 0, started.stderr
    tokenizer = (tiny_models / "tiny" / "tokenizer.json").read_bytes()
    exits = [exit_profile(1, 0.95), exit_profile(2, 0.9), exit_profile(4, 0.9)]
    profile = model_profile("tiny", exits, tokenizer_id=sha256(tokenizer).hexdigest())

    async def write() -> None:
        async with Redis.from_url(command.state()["redis_url"]) as redis:
            await history.write(redis, profile)

    asyncio.run(write())
    yield command
    command.run("down")


def answer(running: Helios, *arguments: str) -> Any:
    done = running.run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def depth(running: Helios) -> int:
    return int(answer(running, "status")["workers"][0]["depth"])


def test_an_operator_watches_steers_and_reads_back(running: Helios) -> None:
    eventually(lambda: depth(running) == 2, "the controller's own choice")

    held = running.run("pin", "--model", "tiny", "--depth", "1")
    assert (held.returncode, held.stdout) == (0, "worker-0: tiny at depth 1 (pinned)\n"), held.stderr
    assert depth(running) == 1
    given_back = running.run("unpin", "--worker", "worker-0")
    assert "(pinned)" not in given_back.stdout
    eventually(lambda: depth(running) == 2, "the plan of the policy")

    asked = running.run("slo", "set", "accuracy", "--max-perplexity-increase", "1%")
    assert asked.stdout == "accuracy, max_perplexity_increase 0.01\n", asked.stderr
    shown = answer(running, "slo", "show")
    assert (shown["mode"], shown["objective"], shown["max_perplexity_increase"]) == (
        "active",
        "accuracy",
        0.01,
    )

    read = answer(running, "decisions")
    assert [one["trigger"] for one in read] == ["start", "operator", "operator", "SLO"]
    assert [one["number"] for one in read] == [1, 2, 3, 4]
    assert [one["depth"] for one in read[0]["options"]] == [1, 2, 4]
    assert "max_perplexity_increase" in read[0]["options"][0]["refused"]
    told = running.run("decisions", "--last", "1").stdout
    assert "SLO" in told
    assert "tokens/s" in told

    frame = running.run("top", "--once", "--interval", "0.5")
    assert frame.returncode == 0, frame.stderr
    for part in ("worker-0", "tiny", "CBC/100", "objective accuracy", "4 "):
        assert part in frame.stdout
    assert answer(running, "top", "--interval", "0.5")["workers"][0]["model"] == "tiny"

    seen = answer(running, "status")
    assert (seen["controller"]["mode"], seen["controller"]["leading"]) == ("active", True)
    assert (seen["slo"]["objective"], seen["slo"]["max_perplexity_increase"]) == ("accuracy", 0.01)
    assert not seen["workers"][0]["pinned"]
    told = running.run("status").stdout
    assert "objective: accuracy, max_perplexity_increase 0.01" in told
    last = answer(running, "decisions", "--last", "1")[0]
    assert seen["last_decision"]["reason"]
    assert f"last decision: {last['number']} " in told


def test_decisions_are_followed_as_they_are_made(running: Helios) -> None:
    last = answer(running, "decisions", "--last", "1")[0]["number"]
    with running.popen("decisions", "--last", "1", "--follow", "--json") as following:
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["number"] == last
        assert running.run("slo", "set", "latency").returncode == 0
        # The last decision may come once more, with its outcome.
        lines = map(json.loads, following.stdout)
        made = next(one for one in lines if one["number"] != last)
        assert (made["number"], made["trigger"]) == (last + 1, "SLO")
        following.kill()


def test_a_stack_serves_and_decides_though_the_environment_names_a_proxy(
    tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("grpc_proxy", "https_proxy", "http_proxy"):
        # Nothing listens there.
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    proxied = Helios(tmp_path / "state", tiny_models)
    started = proxied.up("--profiler", "--controller", "active")
    try:
        assert started.returncode == 0, started.stderr
        assert proxied.run("generate", "a", "--max-tokens", "4").returncode == 0
        # This needs controller, profiler and worker to reach each other.
        eventually(
            lambda: bool(json.loads(proxied.run("decisions", "--json").stdout or "[]")),
            "a decision from what the profiler measured",
        )
    finally:
        proxied.run("down")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pin", "--model", "tiny", "--depth", "3"), "its depths are 1, 2, 4"),
        (("pin", "--model", "nobody", "--depth", "2"), "available: "),
        (("pin", "--model", "tiny", "--depth", "2", "--worker", "zoe"), "known: worker-0"),
        (("slo", "set", "energy"), "energy: unknown"),
        (("slo", "set", "latency", "--max-tpot", "0.0001"), "max_tpot_seconds refuses 3"),
        (("slo", "show", "--target", "127.0.0.1:1"), "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_done_is_one_line_on_stderr(
    running: Helios, arguments: tuple[str, ...], said: str
) -> None:
    refused = running.run(*arguments)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1
