"""Runs a command that cannot outlive the process that started it.

`python tether.py PARENT_PID COMMAND...` asks the kernel to kill this process when its parent ends for any
reason (prctl(2), PR_SET_PDEATHSIG, which execve preserves). Then it becomes the command. It is a separate
program, because Python code between fork and exec is unsafe in a parent with gRPC's threads. On systems other
than Linux it only runs the command.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tethered(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` tethered to the calling process."""
    # -I -S: ignore the environment, do not import site. Starts in about 20 ms.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    """Ties this process to its parent and becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have ended before the call above.
        if os.getppid() != parent:
            sys.exit(1)
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"error: cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
