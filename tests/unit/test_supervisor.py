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
from helios.supervisor import Child, reason_of_end
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


def names(directory: Path) -> list[str]:
    return sorted(one.name for one in directory.iterdir())


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


async def test_child_that_ends_before_it_is_ready_is_an_error_with_the_reason(tmp_path: Path) -> None:
    code = "import sys; print('noise', file=sys.stderr); sys.exit('error: no model in models/')"
    async with child(tmp_path, code) as process:
        with pytest.raises(UnavailableError, match=r"exit status 1: no model in models/ .*child\.log"):
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
        # The process was started, was ready, ended, and was started again.
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


TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "worker.py", line 3, in <module>',
    "    load()",
    "    ^^^^^^",
]
CANCELLED = '{"level": "ERROR", "message": "aborted", "exception": "...", "error": "CancelledError"}'


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ([], "it said nothing"),
        (["one", "error: no model", "stopping"], "no model"),
        (
            [*TRACEBACK, "helios.errors.CheckpointError: no weights", "bye"],
            "helios.errors.CheckpointError: no weights",
        ),
        (
            [
                *TRACEBACK,
                "KeyError: 'a'",
                "",
                "During handling of the above exception:",
                "",
                *TRACEBACK,
                "ValueError: b",
            ],
            "ValueError: b",
        ),
        (
            ['{"level": "ERROR", "message": "uncaught ValueError", "error": "ValueError: no"}'],
            "ValueError: no",
        ),
        (
            ['{"message": "x", "error": "ValueError: no"}', '{"level": "INFO", "message": "stopping"}'],
            "ValueError: no",
        ),
        (['{"message": "x", "error": "ValueError: no"}', CANCELLED], "ValueError: no"),
        ([*TRACEBACK, "MemoryError", *TRACEBACK, "asyncio.exceptions.CancelledError"], "MemoryError"),
        ([CANCELLED], "CancelledError"),
        (
            [CANCELLED, '{"level": "CRITICAL", "message": "the loop has died"}', "+-----+"],
            "the loop has died",
        ),
        (
            ["Fatal Python error: Segmentation fault", "", "Current thread 0x1:", "  <no frame>"],
            "Fatal Python error: Segmentation fault",
        ),
        (['{"level": "INFO", "message": "no Redis at :1"}'], "no Redis at :1"),
        (["terminate called", "  what():  bad_alloc", "+------+", "└──────┘", ""], "what():  bad_alloc"),
        (["[1, 2]"], "[1, 2]"),
    ],
)
def test_reason_of_an_end_is_the_last_exception(log: list[str], reason: str) -> None:
    assert reason_of_end(log) == reason


async def test_reason_of_an_end_is_not_that_of_an_earlier_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = f"""
import sys
from pathlib import Path
print("ready", flush=True)
mark = Path({str(tmp_path / "mark")!r})
if mark.exists():
    sys.exit(7)
mark.touch()
raise ValueError("first")
"""
    async with child(tmp_path, code) as process:
        process.start()
        await eventually(lambda: len(caplog.messages) >= 2)
    first, second = caplog.messages[:2]
    assert "exit status 1: ValueError: first (log: " in first
    assert "exit status 7: ready (log: " in second


async def test_killed_child_is_told_with_the_signal(tmp_path: Path) -> None:
    for number, said in (
        (signal.SIGKILL, r"killed by SIGKILL: memory may have run out .*child\.log"),
        (signal.SIGSEGV, r"killed by SIGSEGV: Fatal Python error: Segmentation fault .*child\.log"),
    ):
        code = f"import faulthandler, os; faulthandler.enable(); os.kill(os.getpid(), {int(number)})"
        async with child(tmp_path, code) as process:
            with pytest.raises(UnavailableError, match=said):
                await asyncio.wait_for(process.start(), SECONDS)


async def test_log_is_begun_anew_at_its_size_and_only_so_many_are_kept(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for i in range(1000): print(f'line {i:04}', file=sys.stderr if i % 2 else sys.stdout, flush=True)\n"
        "raise ValueError('the end')"
    )
    path = tmp_path / "child.log"
    process = Child(
        "child",
        python(code),
        ready_line=READY,
        log_path=path,
        on_change=lambda: None,
        log_bytes=2000,
        log_files=3,
    )
    with pytest.raises(UnavailableError, match="exit status 1: ValueError: the end"):
        await asyncio.wait_for(process.start(), SECONDS)
    await process.stop(SECONDS)
    kept = [path.with_name("child.log.2"), path.with_name("child.log.1"), path]
    assert names(tmp_path) == sorted(one.name for one in kept)
    assert all(one.stat().st_size <= 2000 for one in kept)
    lines = "".join(one.read_text() for one in kept).splitlines()
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line")]
    assert numbers == list(range(numbers[0], 1000))
    assert lines[-1] == "ValueError: the end"


async def test_log_of_the_run_before_is_kept(tmp_path: Path) -> None:
    for word in ("first", "second"):
        async with child(tmp_path, f"import sys; sys.exit({word!r})") as process:
            with pytest.raises(UnavailableError, match=word):
                await asyncio.wait_for(process.start(), SECONDS)
    assert (tmp_path / "child.log.1").read_text() == "first\n"
    assert (tmp_path / "child.log").read_text() == "second\n"


async def test_line_of_any_length_and_any_bytes_is_logged(tmp_path: Path) -> None:
    code = (
        "import sys; sys.stdout.buffer.write(b'x' * 3_000_000 + b'\\n' + bytes([255]) + b'\\nlast'); "
        "sys.stdout.flush(); sys.exit(3)"
    )
    async with child(tmp_path, code) as process:
        with pytest.raises(UnavailableError, match="exit status 3: last"):
            await asyncio.wait_for(process.start(), SECONDS)
    *long, broken, last = (tmp_path / "child.log").read_text().split("\n")[:-1]
    assert sum(map(len, long)) == 3_000_000
    assert (broken, last) == ("\ufffd", "last")
