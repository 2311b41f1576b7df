"""Runs a command that ends, with all processes it has started, when the process that started it does.

`python leash.py PARENT_PID COMMAND...`, as the leader of a process group: the kernel tells it when its parent
ends (prctl(2), PR_SET_PDEATHSIG). helios.tether is for commands without processes of their own; engines have
some. Elsewhere than on Linux the parent's end goes unseen.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_ENDS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# In which a command that is told to end may still clean up.
_GRACE_SECONDS = 10.0


def leashed(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` for the calling process; start it with `process_group=0`."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    """Starts the command, waits for its end or an order to end it, and ends the whole group."""
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
    # Whatever is left, this process with it.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
