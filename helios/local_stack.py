"""A stack of its own for one caller, started with the command `helios up`."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from helios import stack_state
from helios.errors import UnavailableError
from helios.stack_state import StackState
from helios.tether import tethered


@contextlib.contextmanager
def local_stack(*options: str, settings: Mapping[str, str] | None = None) -> Iterator[StackState]:
    """Runs `helios up` with the options, on a free port, apart from any other stack.

    It has no profiler and controller, unless the options ask for them, so that nothing changes the plan.
    settings: further environment variables. Raises UnavailableError with its error when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="helios-stack-") as name, tempfile.TemporaryFile("w+") as said:
        command = [
            *(sys.executable, "-P", "-m", "helios.cli", "up", "--gateway", "127.0.0.1:0"),
            *("--no-profiler", "--controller", "none", *options),
        ]
        # Another stack may use the Redis that the environment names.
        environment = {key: value for key, value in os.environ.items() if key != "HELIOS_REDIS_URL"}
        environment |= {**(settings or {}), "HELIOS_STATE_DIR": name}
        # Tethered, so that no stack is left behind when the caller is killed. A terminal's Ctrl-C goes to the
        # caller alone.
        process = subprocess.Popen(
            tethered(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            is_ready = process.stdout.readline() != ""
            state = stack_state.read(Path(name))
            if not is_ready or state is None:
                process.wait()
                said.seek(0)
                # The error comes last, after the lines about what the start waited for.
                raise UnavailableError(said.read().strip().rpartition("error: ")[2])
            yield state
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
