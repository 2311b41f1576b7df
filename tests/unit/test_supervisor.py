import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from helios.errors import UnavailableError
from helios.supervisor import Child, last_words
from helios.tether import tethered

SECONDS = 60.0
READY = re.compile("^ready")
SERVES = "import time; print('ready', flush=True); time.sleep(600)"
IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', flush=True); time.sleep(600)"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def child(
    tmp_path: Path, code: str, on_change: Callable[[], None] = lambda: None
) -> AsyncIterator[Child]:
    process = Child(
        "child", python(code), ready_line=READY, log_path=tmp_path / "child.log", on_change=on_change
    )
    try:
        yield process
    finally:
        await process.stop(grace_seconds=0.2)


async def test_child_is_ready_once_it_says_so(tmp_path: Path) -> None:
    async with child(tmp_path, SERVES) as process:
        process.start()
        await asyncio.wait_for(process.ready.wait(), SECONDS)
        assert process.pid is not None
        assert is_alive(process.pid)


async def test_child_that_ends_before_it_is_ready_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('noise', file=sys.stderr); sys.exit('error: no model in models/')"
    async with child(tmp_path, code) as process:
        with pytest.raises(UnavailableError, match=r"exit status 1\): no model in models/ .*child\.log"):
            await asyncio.wait_for(process.start(), SECONDS)


async def test_program_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    process = Child(
        "redis", ["/nowhere/redis"], ready_line=READY, log_path=tmp_path / "log", on_change=lambda: None
    )
    with pytest.raises(UnavailableError, match="cannot run /nowhere/redis: No such file"):
        await asyncio.wait_for(process.start(), SECONDS)


async def test_child_has_the_environment_given_to_it_beside_its_parents(tmp_path: Path) -> None:
    code = "import os; print(os.environ['SECRET'], bool(os.environ['PATH'])); print('ready', flush=True)"
    process = Child(
        "child",
        python(code + "; import time; time.sleep(600)"),
        ready_line=READY,
        log_path=tmp_path / "child.log",
        on_change=lambda: None,
        environment={"SECRET": "word"},
    )
    try:
        process.start()
        await asyncio.wait_for(process.ready.wait(), SECONDS)
        assert "word True" in (tmp_path / "child.log").read_text()
    finally:
        await process.stop(grace_seconds=0.2)


async def test_killed_child_is_started_again(tmp_path: Path) -> None:
    pids: list[int | None] = []
    async with child(tmp_path, SERVES, on_change=lambda: pids.append(process.pid)) as process:
        process.start()
        await asyncio.wait_for(process.ready.wait(), SECONDS)
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: process.pid not in (None, first))
        second = process.pid
        # Started, ready, ended, started again.
        assert pids == [first, first, None, second]


async def test_stopped_child_is_not_started_again(tmp_path: Path) -> None:
    async with child(tmp_path, SERVES) as process:
        task = process.start()
        await asyncio.wait_for(process.ready.wait(), SECONDS)
        pid = process.pid
        assert pid is not None
        await process.stop(SECONDS)
        assert task.done()
        assert not is_alive(pid)


async def test_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with child(tmp_path, IGNORES_SIGTERM) as process:
        process.start()
        await asyncio.wait_for(process.ready.wait(), SECONDS)
        pid = process.pid
        assert pid is not None
        await process.stop(grace_seconds=0.05)
        assert not is_alive(pid)


async def test_what_a_child_has_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print('grandchild', p.pid, flush=True); print('ready', flush=True); time.sleep(600)"
    )
    async with child(tmp_path, code) as process:
        process.start()
        await asyncio.wait_for(process.ready.wait(), SECONDS)
        grandchild = int((tmp_path / "child.log").read_text().split()[1])
        await process.stop(SECONDS)
        await eventually(lambda: not is_alive(grandchild))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_tethered_process_ends_when_its_parent_is_killed() -> None:
    command = tethered(["/bin/sleep", "600"])
    code = (
        "import os, subprocess, sys, time; "
        f"command = {command!r}; command[4] = str(os.getpid()); "
        "print(subprocess.Popen(command).pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + SECONDS
    while is_alive(pid):
        assert time.monotonic() < deadline, "outlived its parent"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "it said nothing"),
        ("one\nerror: two\n", "two"),
        ('{"level": "ERROR", "message": "no Redis at :1"}\n', "no Redis at :1"),
        (
            '{"message": "uncaught ValueError", "exception": "Traceback:\\n  x\\nValueError: no"}\n',
            "ValueError: no",
        ),
        ("[1, 2]\n", "[1, 2]"),
        (b"\xff\xfe bytes\n", "\ufffd\ufffd bytes"),
    ],
)
def test_last_words_are_the_message_a_person_reads(tmp_path: Path, log: str | bytes, said: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(log.encode() if isinstance(log, str) else log)
    assert last_words(path) == said


def test_last_words_are_not_those_of_an_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("the first run\n")
    assert last_words(path, offset=path.stat().st_size) == "it said nothing"
