"""`helios up` and the commands that talk to it, run as a person runs them: as separate processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

SECONDS = 60.0
LONG_STREAM = ("--max-tokens", "2000", "--ignore-eos", "--json")


@dataclass(frozen=True)
class Helios:
    """The command, with its own state directory and models."""

    state_dir: Path
    models_dir: Path

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            self._command(arguments),
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            **options,
        )

    def popen(self, *arguments: str) -> "subprocess.Popen[str]":
        """Starts a command."""
        return subprocess.Popen(
            self._command(arguments),
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def up(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`helios up --detach` on a free port."""
        return self.run("up", "--detach", *self.options, *options)

    @property
    def options(self) -> tuple[str, ...]:
        """Options of `helios up` for a small stack on a free port, without profiler and controller."""
        return (
            *("--models-dir", str(self.models_dir), "--model", "tiny"),
            *("--gateway", "127.0.0.1:0", "--workers", "1", "--threads", "1"),
            "--no-profiler",
            *("--controller", "none"),
        )

    def state(self) -> dict[str, Any]:
        """The state file of the running stack."""
        content: dict[str, Any] = json.loads((self.state_dir / "stack.json").read_text())
        return content

    def pids(self) -> list[int]:
        """The ids of all processes of the running stack."""
        state = self.state()
        return [state["pid"], *state["processes"].values()]

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "helios.cli", *arguments]

    def _environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HELIOS_", "OTEL_"))}
        return clean | {"HELIOS_STATE_DIR": str(self.state_dir)}


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pids: list[int]) -> None:
    eventually(lambda: not any(is_alive(pid) for pid in pids), f"the end of {pids}")


@pytest.fixture
def helios(tmp_path: Path, tiny_models: Path) -> Iterator[Helios]:
    """A stack that is not running yet. If the test starts it, it is stopped at the end."""
    command = Helios(tmp_path / "state", tiny_models)
    yield command
    command.run("down")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Helios]:
    """A running stack with two workers."""
    command = Helios(tmp_path_factory.mktemp("state"), tiny_models)
    # This model has a long context, so its streams last while a test looks at them.
    started = command.up("--workers", "2", "--model", "long")
    assert started.returncode == 0, started.stderr
    assert started.stdout.startswith(
        f"ready gateway={command.state()['gateway']} workers=2 model=long depth=4"
    )
    assert started.stdout.count("\n") == 1
    yield command
    command.run("down")


def test_generate_streams_the_text_that_the_events_carry(running: Helios) -> None:
    options = ("--max-tokens", "12", "--ignore-eos")
    text = running.run("generate", "def main():", *options)
    assert text.returncode == 0, text.stderr
    events = [
        json.loads(line)
        for line in running.run("generate", "def main():", *options, "--json").stdout.splitlines()
    ]
    *tokens, finish = events
    assert [token["index"] for token in tokens] == list(range(12))
    assert finish["event"] == "finish"
    assert finish["reason"] == "length"
    assert finish["completion_tokens"] == 12
    assert "".join(token["text"] for token in tokens) == finish["text"] == text.stdout.removesuffix("\n")


def test_a_stack_with_a_smaller_context_ends_its_texts_there_and_refuses_longer_prompts(
    helios: Helios,
) -> None:
    started = helios.up("--context-tokens", "48", "--profiler", "--controller", "advisory")
    assert started.returncode == 0, started.stderr
    options = ("--max-tokens", "500", "--ignore-eos", "--json")
    *tokens, finish = map(json.loads, helios.run("generate", "def main():", *options).stdout.splitlines())
    assert finish["reason"] == "length"
    assert finish["prompt_tokens"] + len(tokens) == 48
    refused = helios.run("generate", "def main(): " * 30, *options)
    assert refused.returncode != 0
    assert "the model's context of 48" in refused.stderr


def test_sampled_text_repeats_with_its_seed(running: Helios) -> None:
    options = ("--max-tokens", "16", "--temperature", "1", "--top-k", "50", "--top-p", "0.9")
    first, again, other = (
        running.run("generate", "import", *options, "--seed", seed).stdout for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_prompt_can_come_from_stdin(running: Helios) -> None:
    options = ("--max-tokens", "8")
    piped = running.run("generate", "-", *options, input="parser = argparse\n")
    assert piped.stdout == running.run("generate", "parser = argparse", *options).stdout


def test_first_tokens_arrive_before_the_last(running: Helios) -> None:
    process = running.popen("generate", "a", *LONG_STREAM)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["index"] == 0
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert '"finish"' not in rest
    assert said.strip() == ""


def test_reader_that_leaves_early_sees_no_traceback(running: Helios) -> None:
    process = running.popen("generate", "a", *LONG_STREAM)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("", "--max-tokens", "4"), "prompt"),
        (("x", "--max-tokens", "0"), "max_tokens"),
        (("x", "--temperature", "nan"), "temperature"),
        (("x", "--top-p", "0"), "top_p"),
        (("x", "--model", "nope"), "nope"),
        (("\udcff",), "UTF-8"),
        (("x", "--target", "127.0.0.1:1"), "127.0.0.1:1"),
    ],
)
def test_bad_request_is_one_line_on_stderr(running: Helios, arguments: tuple[str, ...], reason: str) -> None:
    answer = running.run("generate", *arguments)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
    assert reason in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_redis_url_is_not_among_what_everybody_can_read(running: Helios) -> None:
    url = running.state()["redis_url"]
    shown = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in running.pids()]
    assert len(shown) == 5
    assert not any(url in line for line in shown)


def test_status_tells_workers_load_and_limits(running: Helios) -> None:
    status = json.loads(running.run("status", "--json").stdout)
    assert {worker["worker_id"] for worker in status["workers"]} == {"worker-0", "worker-1"}
    for worker in status["workers"]:
        assert worker["ready"]
        assert (worker["model"], worker["depth"]) == ("long", 4)
        assert worker["blocks_free"] == worker["blocks_total"] > 0
    assert status["problems"] == []
    assert status["limits"]["max_open_streams"] > 0
    assert {"open_streams", "queued_streams"} <= status.keys()
    assert (status["controller"], status["slo"]) == (None, None)
    shown = running.run("status").stdout
    assert "worker-0" in shown
    assert "long" in shown
    assert "plans stay as they are" in shown


def test_status_tells_a_profiler_that_starts_from_one_that_is_gone(running: Helios) -> None:
    file, state = running.state_dir / "stack.json", running.state()
    assert state["starting"] == []
    try:
        for starting, said in (["profiler"], "profiler: still starting"), ([], "127.0.0.1:1 does not answer"):
            file.write_text(json.dumps(state | {"profiler": "127.0.0.1:1", "starting": starting}))
            problems = json.loads(running.run("status", "--json").stdout)["problems"]
            assert said in " ".join(problems)
    finally:
        file.write_text(json.dumps(state))


def test_target_finds_a_stack_from_elsewhere(running: Helios, tmp_path: Path) -> None:
    elsewhere = Helios(tmp_path, running.models_dir)
    answer = elsewhere.run("status", "--json", "--target", running.state()["gateway"])
    assert len(json.loads(answer.stdout)["workers"]) == 2


def test_second_stack_is_told_of_the_first(running: Helios) -> None:
    second = running.up()
    assert second.returncode == 1
    assert f"already running: gateway={running.state()['gateway']}" in second.stderr


def test_killed_processes_are_started_again_and_streams_flow(running: Helios) -> None:
    before = running.state()["processes"]
    for name in ("worker-1", "redis", "gateway"):
        os.kill(before[name], signal.SIGKILL)
    names = set(before)

    def is_back() -> bool:
        now = running.state()["processes"]
        return set(now) == names and all(
            now[name] != before[name] for name in ("worker-1", "redis", "gateway")
        )

    eventually(is_back, "new processes")
    eventually(
        lambda: (
            [
                worker["ready"]
                for worker in json.loads(running.run("status", "--json").stdout or "{}").get("workers", [])
            ]
            == [True, True]
        ),
        "both workers ready again",
    )
    assert running.state()["processes"]["worker-0"] == before["worker-0"]
    assert running.run("generate", "a", "--max-tokens", "4").returncode == 0
    log = (running.state_dir / "logs" / "up.log").read_text()
    assert "worker-1 ended, killed by SIGKILL: memory may have run out" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after(number: signal.Signals, helios: Helios) -> None:
    with helios.popen("up", *helios.options) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready gateway=")
        pids = helios.pids()
        assert len(pids) == 4
        process.send_signal(number)
        assert process.wait(SECONDS) == (-number if number == signal.SIGKILL else 0)
        wait_until_dead(pids)
    assert helios.run("status").stderr.startswith("error: no running stack found")


def test_second_interrupt_does_not_wait_for_a_worker_that_hangs(helios: Helios) -> None:
    with helios.popen("up", *helios.options) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pids = helios.pids()
        running = helios.state()["processes"]
        os.kill(running["worker-0"], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        wait_until_dead([running["gateway"]])
        assert is_alive(running["worker-0"])
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        assert "did not stop within" not in said
        wait_until_dead(pids)


def test_interrupt_during_the_start_leaves_nothing(helios: Helios) -> None:
    with helios.popen("up", *helios.options) as process:
        eventually(
            lambda: (helios.state_dir / "stack.json").exists() and "worker-0" in helios.state()["processes"],
            "the start of a worker",
        )
        pids = helios.pids()
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        wait_until_dead(pids)


def test_detached_stack_serves_until_down(helios: Helios) -> None:
    assert helios.up().returncode == 0
    pids = helios.pids()
    assert all(is_alive(pid) for pid in pids)
    assert helios.run("down").returncode == 0
    supervisor, *processes = pids
    assert not any(is_alive(pid) for pid in processes)
    wait_until_dead([supervisor])
    assert helios.run("down").returncode == 0


def test_stack_starts_again_after_it_was_killed(helios: Helios) -> None:
    assert helios.up().returncode == 0
    pids = helios.pids()
    os.kill(pids[0], signal.SIGKILL)
    wait_until_dead(pids)
    again = helios.up()
    assert again.returncode == 0, again.stderr


def test_taken_port_is_named(helios: Helios) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        answer = helios.run("up", *helios.options, "--gateway", address)
    assert answer.returncode == 1
    assert f"cannot listen on {address}: Address already in use" in answer.stderr
    assert "--gateway" in answer.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--models-dir", "/nowhere"), "/nowhere"),
        (("--model", "nope"), "available: long, other, tiny"),
        (("--depth", "3"), "1, 2, 4"),
        (("--redis", "redis://127.0.0.1:1"), "no Redis answers at redis://127.0.0.1:1"),
        (("--redis", "127.0.0.1"), "no Redis URL"),
    ],
)
def test_impossible_stack_is_refused_with_the_reason(
    helios: Helios, options: tuple[str, ...], reason: str
) -> None:
    answer = helios.up(*options)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
    assert reason in answer.stderr


def test_worker_that_cannot_load_its_model_ends_the_start_with_the_file(
    helios: Helios, tmp_path: Path, tiny_models: Path
) -> None:
    models_dir = tmp_path / "models"
    shutil.copytree(tiny_models / "tiny", models_dir / "tiny")
    weights = models_dir / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    answer = helios.up("--models-dir", str(models_dir))
    assert answer.returncode == 1
    assert "error: worker-0 ended while starting, exit status 1: " in answer.stderr
    assert str(weights) in answer.stderr
    assert not (helios.state_dir / "stack.json").exists()


def test_given_redis_is_used_instead_of_an_own_one(helios: Helios, redis_url: str) -> None:
    started = helios.up("--redis", redis_url)
    assert started.returncode == 0, started.stderr
    assert f"redis={redis_url}" in started.stdout
    assert set(helios.state()["processes"]) == {"gateway", "worker-0"}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("CONFIG SET maxmemory 1", "its memory is full; raise its maxmemory"),
        ("REPLICAOF 127.0.0.1 1", "it is a read-only replica; name the primary's URL"),
        ("ACL SETUSER default -@write", "its user lacks a right; Helios needs"),
        ("ACL SETUSER default resetkeys ~other:*", "its user lacks a right; Helios needs"),
    ],
)
def test_redis_that_takes_no_writes_ends_the_start_with_the_reason(
    helios: Helios, redis_url: str, command: str, reason: str
) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.execute_command(*command.split())
    answer = helios.up("--redis", redis_url)
    assert answer.returncode == 1
    said = f"error: the Redis at {redis_url} cannot be used: Redis refuses it, because {reason}"
    assert answer.stderr.startswith(said)
    assert answer.stderr.count("\n") == 1
    assert not list((helios.state_dir / "logs").glob("worker-*"))


@pytest.mark.parametrize("form", ["redis://:{password}@{host}", "redis://{host}?password={password}"])
def test_password_of_a_redis_in_use_is_nowhere_to_be_read(helios: Helios, redis_url: str, form: str) -> None:
    password = "sec@ret"
    with Redis.from_url(redis_url) as redis:
        redis.config_set("requirepass", password)
    url = form.format(password=password, host=redis_url.removeprefix("redis://"))
    started = helios.up("--redis", url, "--profiler", "--controller", "active")
    assert started.returncode == 0, started.stderr
    assert "***" in started.stdout
    eventually(lambda: {"profiler", "controller"} <= set(helios.state()["processes"]), "all processes")
    said = [started.stdout, started.stderr]
    said += [Path(f"/proc/{pid}/cmdline").read_text() for pid in helios.pids()]
    assert helios.run("down").returncode == 0
    said += [path.read_text() for path in helios.state_dir.rglob("*") if path.is_file()]
    assert len(said) > 10
    for text in said:
        assert "ret@" not in text
        assert "sec@" not in text
        assert "@ret" not in text
    if "?" not in form:
        assert "the password holds '@' as it is; write %40 in its place" in "".join(said)


def test_password_of_a_given_redis_is_not_shown(helios: Helios) -> None:
    answer = helios.up("--redis", "redis://user:secret@127.0.0.1:1")
    assert answer.returncode == 1
    assert "no Redis answers at redis://user:***@127.0.0.1:1" in answer.stderr
    assert "secret" not in answer.stderr


def test_who_says_what_to_serve_is_only_advised_and_told_so(helios: Helios) -> None:
    *options, _, _ = helios.options
    with helios.popen("up", *options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "controller=advisory" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert "--model given: the controller only advises" in process.stderr.readline()


def test_controller_chooses_unless_somebody_says_what_to_serve(helios: Helios) -> None:
    options = ["up", "--models-dir", str(helios.models_dir), "--gateway", "127.0.0.1:0", "--workers", "1"]
    with helios.popen(*options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "controller=active" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        first, *rest = process.stderr.read().splitlines()
    assert first.endswith("waiting for gateway, worker-0, controller, profiler")
    assert all("waiting for" in line for line in rest)


def test_all_that_was_asked_for_answers_once_the_stack_is_ready(helios: Helios) -> None:
    started = helios.up("--workers", "2", "--controller", "active", "--profiler")
    assert started.returncode == 0, started.stderr
    pinned = helios.run("pin", "--model", "tiny", "--depth", "2")
    assert pinned.stdout.splitlines() == [
        "worker-0: tiny at depth 2 (pinned)",
        "worker-1: tiny at depth 2 (pinned)",
    ], pinned.stderr
    measured = helios.run("profile", "--history")
    assert measured.returncode == 0, measured.stderr
    status = json.loads(helios.run("status", "--json").stdout)
    assert status["controller"]["leading"]
    assert helios.state()["starting"] == []
    # Meanwhile it said what it was waiting for.
    assert "waiting for" in started.stderr


def test_stack_beside_another_on_one_redis_starts_with_a_controller_that_stands_by(
    helios: Helios, redis_url: str, tmp_path: Path
) -> None:
    options = ("--controller", "active", "--redis", redis_url)
    assert helios.up(*options).returncode == 0
    leader = helios.state()["controller"]
    second = Helios(tmp_path / "second", helios.models_dir)
    try:
        started = second.up(*options)
        assert started.returncode == 0, started.stderr
        assert "the controller does not lead: " in started.stderr
        assert leader in started.stderr
    finally:
        second.run("down")


def test_worker_that_is_killed_while_it_starts_is_told_with_its_log(helios: Helios) -> None:
    with helios.popen("up", *helios.options) as process:
        eventually(
            lambda: (helios.state_dir / "stack.json").exists() and "worker-0" in helios.state()["processes"],
            "the start of a worker",
        )
        os.kill(helios.state()["processes"]["worker-0"], signal.SIGKILL)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    *_, last = said.splitlines()
    assert last.startswith("error: worker-0 ended while starting, killed by SIGKILL: memory may have run out")
    assert last.endswith(f"(log: {helios.state_dir / 'logs' / 'worker-0.log'})")


def test_verbose_shows_what_the_processes_log(helios: Helios) -> None:
    with helios.popen("up", *helios.options, "--verbose") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("ready gateway=")
        process.send_signal(signal.SIGINT)
        shown = process.stderr.read()
    for name in ("redis", "worker-0", "gateway"):
        assert f"{name} | " in shown


def test_profile_measures_models_beside_the_stack_and_keeps_what_it_measured(helios: Helios) -> None:
    assert helios.up("--profiler").returncode == 0
    shown = helios.run("profile", "--models", "tiny,other", "--requests", "1")
    assert shown.returncode == 0, shown.stderr
    for text in ("tiny", "other", "1 bundled prompts", "power: "):
        assert text in shown.stdout
    kept = json.loads(helios.run("profile", "--history", "--json").stdout)
    assert {profile["model"] for profile in kept} == {"tiny", "other"}
    measured = json.loads(helios.run("profile", "--models", "tiny", "--requests", "2", "--json").stdout)
    assert [(profile["model"], profile["requests"]) for profile in measured] == [("tiny", 2)]
    assert [one["depth"] for one in measured[0]["exits"]] == [1, 2, 4]
    refused = helios.run("profile", "--models", "nobody")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: no model 'nobody'")
    profiler = helios.state()["processes"]["profiler"]
    assert helios.run("down").returncode == 0
    assert not is_alive(profiler)


def test_profile_without_a_profiler_says_how_to_get_one(running: Helios) -> None:
    answer = running.run("profile")
    assert answer.returncode == 1
    assert "start it without --no-profiler" in answer.stderr
    nobody = running.run("profile", "--models", "a,,b")
    assert nobody.returncode == 2
