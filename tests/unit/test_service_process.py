"""A service says that it is ready once its start is complete, and ends when it is told to stop."""

import gc
import json
import re
import signal
import sys
from pathlib import Path

import pytest

from helios import service_process
from helios.stop_deadline import EXIT_STATUS
from tests.stack import STOP_SECONDS, Process
from tests.streams import until

# A service whose behaviour the test gives: while it serves, and when it is told to stop.
SERVICE = """
import asyncio, ctypes, sys, threading, time
from pydantic_settings import SettingsConfigDict
from helios import service_process
from helios.settings import ServiceSettings

class Settings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="EXAMPLE_", cli_prog_name="example")

async def refuse():
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass

async def serve(settings):
    stop = service_process.StopSignal(settings.stop_seconds)
    service_process.say_ready("example:1")
    left = [{serving}]
    await stop.wait()
    {stopping}
    return 0

if __name__ == "__main__":
    sys.exit(service_process.run("example", Settings, serve))
"""


def start_service(directory: Path, stop_seconds: float, serving: str = "", stopping: str = "pass") -> Process:
    program = directory / "example.py"
    program.write_text(SERVICE.replace("{serving}", serving).replace("{stopping}", stopping))
    # With -c, Helios is imported from the same place as in the test.
    run = f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')"
    command = [sys.executable, "-c", run, "--stop-seconds", str(stop_seconds)]
    return Process("example", command, directory, "ready address=")


def test_what_is_there_when_a_service_is_ready_is_left_alone_by_the_collector(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = gc.get_freeze_count()
    try:
        service_process.say_ready("127.0.0.1:1")
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()
    assert capsys.readouterr().out == "ready address=127.0.0.1:1\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_is_told_to_stop_ends_by_itself(tmp_path: Path, number: signal.Signals) -> None:
    service = start_service(tmp_path, 600)
    service.process.send_signal(number)
    assert service.process.wait(STOP_SECONDS) == 0
    assert json.loads(service.log.splitlines()[-1])["message"] == "stopping"


@pytest.mark.parametrize(
    ("serving", "left"),
    [
        pytest.param(
            "asyncio.create_task(refuse(), name='stubborn')",
            r"task stubborn at __main__:\d+ \(refuse\) > asyncio.locks:\d+ \(Event.wait\)",
            id="a task that refuses its cancellation",
        ),
        pytest.param(
            "threading.Thread(target=threading.Event().wait, name='stuck').start()",
            r"thread MainThread at threading:\d+ .*; thread stuck at threading:\d+ \(Condition.wait\)",
            id="a thread that does not end",
        ),
        pytest.param(
            "asyncio.create_task(asyncio.to_thread(threading.Event().wait))",
            r"task .* \(shutdown_default_executor\); .*thread \w+_0 at threading:\d+ \(Condition.wait\)",
            id="a call in the loop's own threads",
        ),
        pytest.param(
            "time.sleep(3600)", r"thread MainThread at __main__:\d+ \(serve\)", id="a blocked event loop"
        ),
    ],
)
def test_a_service_that_does_not_stop_says_what_it_waits_for_and_ends(
    tmp_path: Path, serving: str, left: str
) -> None:
    service = start_service(tmp_path, 0.5, serving)
    assert service.terminate() == EXIT_STATUS
    last = json.loads(service.log.splitlines()[-1])
    assert last["level"] == "CRITICAL"
    assert last["message"].startswith("has not stopped 0.5 s after it was told to")
    assert re.search(left, last["message"]), last["message"]


def test_a_service_ends_even_if_code_never_gives_the_interpreters_lock_back(tmp_path: Path) -> None:
    service = start_service(tmp_path, 0.5, stopping="ctypes.PyDLL(None).sleep(3600)")
    assert service.terminate() == 1
    assert "in serve" in service.log.rpartition("Timeout")[2]


async def test_a_second_signal_ends_a_service_at_once(tmp_path: Path) -> None:
    service = start_service(tmp_path, 600, stopping="await refuse()")
    service.process.terminate()

    async def stops() -> bool:
        return "stopping" in service.log

    await until(stops, "the service to stop")
    assert service.terminate() == -signal.SIGTERM
