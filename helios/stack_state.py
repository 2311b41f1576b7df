"""Lets other commands find a running local stack, through a lock and a state file.

`helios up` holds the lock file (flock) for as long as it lives. So a state file without a held lock is stale,
even if its process ids have been reused.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO

from helios.errors import SettingsError, UnavailableError

_STATE_FILE = "stack.json"
_LOCK_FILE = "stack.lock"
_LOCK_ATTEMPTS = 5
_LOCK_PAUSE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class StackState:
    """A running stack. Addresses are host:port. `started` is in seconds since the epoch."""

    pid: int
    gateway: str
    redis_url: str
    model: str
    depth: int
    started: float
    models_dir: str = ""
    """The directory from which its workers load models."""
    ready: bool = False
    profiler: str = ""
    """host:port. Empty: the stack has no profiler."""
    controller: str = ""
    """host:port. Empty: the stack has no controller."""
    processes: dict[str, int] = field(default_factory=dict)
    """Process ids by name: redis, gateway, worker-0 and so on."""
    starting: list[str] = field(default_factory=list)
    """Names of the processes that have not answered yet."""


def state_dir() -> Path:
    """Directory of state and logs: $HELIOS_STATE_DIR, or helios/ in the XDG state directory."""
    if chosen := os.environ.get("HELIOS_STATE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "helios"


def logs_dir(directory: Path) -> Path:
    """Directory of the processes' logs."""
    return directory / "logs"


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Holds the lock of a state directory. Removes the state file at the end.

    Raises SettingsError when another stack holds the lock, or the directory is not writable.
    """
    try:
        logs_dir(directory).mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK_FILE).open("a")
    except OSError as error:
        raise SettingsError(
            f"cannot write to {directory}: {error.strerror}; name another directory with HELIOS_STATE_DIR"
        ) from error
    with lock:
        if not _lock(lock):
            raise SettingsError(_already_running(directory))
        try:
            yield
        finally:
            (directory / _STATE_FILE).unlink(missing_ok=True)


def write(directory: Path, state: StackState) -> None:
    """Replaces the state file atomically, so that readers see either the old or the new one."""
    draft = directory / f"{_STATE_FILE}.new"
    # A Redis URL may contain a password.
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as sink:
        # An existing draft of a killed stack would keep its old mode.
        os.fchmod(sink.fileno(), 0o600)
        sink.write(json.dumps(asdict(state), indent=2) + "\n")
    draft.replace(directory / _STATE_FILE)


def read(directory: Path) -> StackState | None:
    """The running stack. None if there is none; the state file of a dead stack does not count."""
    if not is_held(directory):
        return None
    try:
        return _parsed(directory / _STATE_FILE)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{directory / _STATE_FILE} is not a stack's state: {error}") from error


def is_held(directory: Path) -> bool:
    """Whether a stack uses this state directory now."""
    try:
        lock = (directory / _LOCK_FILE).open("r")
    except FileNotFoundError:
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def find_serving(part: str = "gateway", model: str = "") -> StackState:
    """The running stack.

    Raises UnavailableError when there is none or it does not serve yet. `part`: which service the error
    message suggests to name instead. `model`: which model it suggests to serve.
    """
    directory = state_dir()
    state = read(directory)
    if state is None:
        raise UnavailableError(
            f"no running stack found: start one with `helios up{f' --model {model}' if model else ''}`, or "
            f"name a {part} with --target HOST:PORT"
        )
    if not state.ready:
        raise UnavailableError(f"the stack is still starting (logs: {logs_dir(directory)}): try again soon")
    return state


def find_gateway(target: str | None, model: str = "") -> str:
    """The gateway's address: the target if given, otherwise the running stack's.

    Raises UnavailableError when there is neither; it suggests to serve `model`.
    """
    return target or find_serving("gateway", model).gateway


def find_profiler(target: str | None) -> str:
    """The profiler's address: the target if given, otherwise the running stack's.

    Raises UnavailableError when there is neither.
    """
    address = target or find_serving("profiler").profiler
    if not address:
        raise UnavailableError(
            "the running stack has no profiler: start it without --no-profiler, or name a profiler with "
            "--target HOST:PORT"
        )
    return address


def find_controller(target: str | None) -> str:
    """The controller's address: the target if given, otherwise the running stack's.

    Raises UnavailableError when there is neither.
    """
    address = target or find_serving("controller").controller
    if not address:
        raise UnavailableError("the running stack has no controller: name one with --target HOST:PORT")
    return address


def _parsed(file: Path) -> StackState:
    """Parses a state file. Ignores fields of newer versions. Raises OSError, ValueError, TypeError."""
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    known = {one.name for one in fields(StackState)}
    return StackState(**{name: value for name, value in content.items() if name in known})


def _lock(lock: IO[str]) -> bool:
    # Another reader that checks the lock holds it for a moment, so this tries several times.
    for _ in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_SECONDS)
        else:
            return True
    return False


def _already_running(directory: Path) -> str:
    try:
        state = _parsed(directory / _STATE_FILE)
    except (OSError, ValueError, TypeError):
        running = "a stack is already running"
    else:
        running = f"a stack is already running: gateway={state.gateway} pid={state.pid}"
    return f"{running}; stop it with `helios down`, or set HELIOS_STATE_DIR to run another beside it"
