"""Runs a command and ends it, with all processes that it has started, when its parent ends.

`python leash.py PARENT_PID COMMAND...`, as the leader of a process group. The Linux kernel signals
the end of the parent (prctl(2), PR_SET_PDEATHSIG); other systems do not. helios.tether does the same for
commands that start no child processes. Engines start some.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_ENDS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# Time for a command to clean up after it was told to end.
_GRACE_SECONDS = 10.0


def leashed(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on the caller's leash. Start it with `process_group=0`."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    """Starts the command, waits until it ends or a signal comes, and ends the whole group."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_ENDS, signal.SIGCHLD})
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # The parent may have ended before the call above.
        if os.getppid() != parent:
            sys.exit(1)
    try:
        child = os.posix_spawn(command[0], command, os.environ, setsigmask=())
    except OSError as error:
        sys.exit(f"error: cannot run {command[0]}: {error.strerror}")
    while (got := signal.sigwait({*_ENDS, signal.SIGCHLD})) == signal.SIGCHLD:
        if os.waitpid(child, os.WNOHANG)[0]:
            break
    if got != signal.SIGCHLD:
        os.kill(child, signal.SIGTERM)
        signal.sigtimedwait({signal.SIGCHLD}, _GRACE_SECONDS)
    # Ends whatever is left, and this process.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
