"""`helios up` and `helios down`: the local stack."""

import asyncio
import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from helios import stack_state
from helios.cli.checkpoints import models_dir_option
from helios.cli.target import Address
from helios.errors import SettingsError, UnavailableError, UnknownModelError
from helios.modes import ExitMode, Precision
from helios.stack_state import StackState

if TYPE_CHECKING:
    from helios.catalog import ModelEntry
    from helios.stack import StackSettings

_DEFAULT_WORKERS = 2
_DEFAULT_GATEWAY = "127.0.0.1:50051"
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.05
_LISTEN_SECONDS = 0.2
# Lines that say what a start waits for begin with this.
_STARTING = "starting "

log = logging.getLogger(__name__)


@click.command()
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes. Default: 2, or 1 on one core.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of each worker. Default: cores divided by workers."
)
@models_dir_option
@click.option("--model", help="Default: the first of the models directory.")
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    help="Layers to load. Default: the model's own choice; all, unless the mode is greedy.",
)
@click.option(
    "--exit-mode",
    type=click.Choice([one.value for one in ExitMode]),
    help="How tokens leave: all at the depth (greedy, the default), each at its own exit (dynamic), never "
    "early (full).",
)
@click.option(
    "--precision",
    type=click.Choice([one.value for one in Precision]),
    default="auto",
    show_default=True,
    help="Precision of the products. auto: int8 on a CPU with AVX-512 VNNI, bfloat16 on a GPU, else float32.",
)
@click.option(
    "--context-tokens",
    type=click.IntRange(min=2),
    help="Most tokens of prompt and output together. A smaller context needs less memory. Default: the "
    "model's.",
)
@click.option(
    "--gateway",
    type=Address(any_port=True),
    metavar="HOST:PORT",
    default=_DEFAULT_GATEWAY,
    show_default=True,
    help="Where clients connect; port 0 is any free one.",
)
@click.option(
    "--redis",
    "redis_url",
    envvar="HELIOS_REDIS_URL",
    metavar="URL",
    help="Use this Redis; with a password better in HELIOS_REDIS_URL, which `ps` does not show. Default: "
    "start one, on a loopback port.",
)
@click.option(
    "--profiler/--no-profiler",
    default=True,
    show_default=True,
    help="Measure models beside serving, when `helios profile` or a controller asks for it.",
)
@click.option(
    "--controller",
    type=click.Choice(["active", "advisory", "off", "none"]),
    help="Model and depth follow: a controller, you with its advice, you alone with `helios pin`, or nobody. "
    "Default: active, or advisory when you say what to serve (--model, --depth, --exit-mode).",
)
@click.option(
    "--log-bytes",
    type=click.IntRange(min=10_000),
    envvar="HELIOS_LOG_BYTES",
    show_envvar=True,
    default=10_000_000,
    show_default=True,
    help="Size at which the log of a process is renamed, to end in .1, and begun anew.",
)
@click.option(
    "--log-files",
    type=click.IntRange(min=2),
    envvar="HELIOS_LOG_FILES",
    show_envvar=True,
    default=5,
    show_default=True,
    help="Logs kept of each process, the current one included.",
)
@click.option("--detach", is_flag=True, help="Return once the stack serves; `helios down` stops it.")
@click.option("--verbose", is_flag=True, help="Show what the processes log.")
# --detach starts a process with this option. Its stderr is up.log.
@click.option("--detached", is_flag=True, hidden=True)
def up(
    *,
    workers: int | None,
    threads: int | None,
    models_dir: Path | None,
    model: str | None,
    depth: int | None,
    exit_mode: str | None,
    precision: str,
    context_tokens: int | None,
    gateway: str,
    redis_url: str | None,
    profiler: bool,
    controller: str | None,
    log_bytes: int,
    log_files: int,
    detach: bool,
    verbose: bool,
    detached: bool,
) -> None:
    """Start Redis, workers, a gateway, a profiler and a controller, and serve until Ctrl-C.

    Prints `ready gateway=HOST:PORT ...` once all of them answer. State and logs are kept in
    $HELIOS_STATE_DIR, by default ~/.local/state/helios.
    """
    if controller is None:
        controller = _default_controller([("--model", model), ("--depth", depth), ("--exit-mode", exit_mode)])
    if detach:
        _log_to(logging.StreamHandler())
        _start_detached(controller, redis_url)
    _log_to(
        _StderrLog(_up_log(), maxBytes=log_bytes, backupCount=log_files - 1, encoding="utf-8")
        if detached
        else logging.StreamHandler()
    )
    from helios import catalog, stack

    exit_mode = exit_mode or ExitMode.GREEDY.value
    directory = catalog.find_models_dir(models_dir)
    entry = catalog.find_model(directory, model) if model else _first_model(directory)
    if depth is not None:
        entry.facts.check_depth(depth, entry.name)
    cores = len(os.sched_getaffinity(0))
    workers = workers or min(_DEFAULT_WORKERS, cores)
    settings = stack.StackSettings(
        models_dir=directory.resolve(),
        model=entry.name,
        # Only in mode greedy all tokens leave at the depth. The other modes need every layer.
        depth=depth or (entry.default_depth if exit_mode == ExitMode.GREEDY else entry.num_layers),
        exit_mode=exit_mode,
        precision=precision,
        workers=workers,
        threads=threads or max(1, cores // workers),
        gateway=gateway,
        redis_url=redis_url,
        context_tokens=context_tokens,
        profiler=profiler,
        controller=controller,
        log_bytes=log_bytes,
        log_files=log_files,
    )
    was_ready = False
    what = f"{_STARTING}{settings.workers} x {settings.model}, {settings.depth} layers"
    with _Progress(what) as progress:

        def on_ready(state: StackState) -> None:
            nonlocal was_ready
            was_ready = True
            progress.end()
            click.echo(_ready_line(settings, state))

        def on_progress(awaited: Iterable[str]) -> None:
            if awaited:
                progress.say(f"{what}: waiting for {', '.join(awaited)}")

        def on_line(name: str, line: str) -> None:
            if verbose:
                log.info("%s | %s", name, line)

        directory = stack_state.state_dir()
        asyncio.run(stack.serve(settings, directory, on_ready, on_progress=on_progress, on_line=on_line))
    if not was_ready:
        raise click.Abort


@click.command()
def down() -> None:
    """Stop the stack that `helios up` has started."""
    directory = stack_state.state_dir()
    state = stack_state.read(directory)
    if state is None:
        click.echo("no stack is running", err=True)
        return
    with contextlib.suppress(ProcessLookupError):  # It may have ended by itself a moment ago.
        os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while stack_state.is_held(directory):
        if time.monotonic() > deadline:
            # Its processes are tethered, so they end with it.
            os.kill(state.pid, signal.SIGKILL)
            raise UnavailableError(f"the stack (pid {state.pid}) did not stop in time and was killed")
        time.sleep(_POLL_SECONDS)
    click.echo("stopped", err=True)


def _default_controller(asked: Sequence[tuple[str, object]]) -> str:
    """The mode when none is given: `advisory`, with a message, if the user says what to serve."""
    named = " and ".join(option for option, value in asked if value is not None)
    if not named:
        return "active"
    click.echo(
        f"{named} given: the controller only advises; let it choose with --controller active", err=True
    )
    return "advisory"


def _first_model(models_dir: Path) -> "ModelEntry":
    from helios import catalog

    found = catalog.read_catalog(models_dir)
    if not found.models:
        problems = "; ".join(f"{model.name}: {model.reason}" for model in found.broken)
        raise UnknownModelError(
            f"no model to serve in {models_dir}{f' ({problems})' if problems else ''}: "
            "fetch one with `helios models pull`, or choose another directory with --models-dir"
        )
    return found.models[0]


def _ready_line(settings: "StackSettings", state: StackState) -> str:
    from helios import redis_url

    return (
        f"ready gateway={state.gateway} workers={settings.workers} model={settings.model} "
        f"depth={settings.depth} exit-mode={settings.exit_mode} controller={settings.controller} "
        f"redis={redis_url.shown(state.redis_url)}"
    )


def _start_detached(controller: str, redis_url: str | None) -> NoReturn:
    """Runs this command again without --detach, in its own session, and waits for its ready line.

    Its messages are shown meanwhile. If it ends without that line, this process exits with its status.
    """
    path = _up_log()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sink = path.open("ab")
    except OSError as error:
        raise SettingsError(
            f"cannot write to {path.parent}: {error.strerror}; name another directory with HELIOS_STATE_DIR"
        ) from error
    arguments = [*_without_redis(sys.argv[1:]), "--controller", controller, "--detached"]
    # The URL may hold a password, and everybody can read a command line (ps) while the stack runs.
    environment = {**os.environ, **({"HELIOS_REDIS_URL": redis_url} if redis_url else {})}
    said: list[str] = []
    with sink, path.open("rb") as source, _Progress("starting") as progress:
        source.seek(0, os.SEEK_END)

        def listen() -> None:
            for line in source:
                text = line.decode(errors="replace").rstrip("\n")
                if text.startswith(_STARTING):
                    progress.say(text)
                else:
                    said.append(text)

        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "helios.cli", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=sink,
            start_new_session=True,
            text=True,
        )
        assert process.stdout is not None
        try:
            while not select.select([process.stdout], [], [], _LISTEN_SECONDS)[0]:
                listen()
            ready_line = process.stdout.readline()
        except KeyboardInterrupt:
            process.terminate()
            raise
        status = 0 if ready_line else process.wait() or 1
        listen()
    for text in said:
        click.echo(text, err=True)
    click.echo(ready_line, nl=False)
    sys.exit(status)


def _without_redis(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments of `helios up` without --detach, and without --redis and its value."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--redis":
            next(rest, None)
        elif argument != "--detach" and not argument.startswith("--redis="):
            yield argument


class _Progress:
    """Shows on stderr what a start waits for: one changing line on a terminal, otherwise one line each."""

    def __init__(self, text: str) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._status = console.status(text) if console.is_terminal else None

    def __enter__(self) -> "_Progress":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def say(self, text: str) -> None:
        """Shows a text: what the start waits for now."""
        from rich.markup import escape

        if self._status is not None:
            self._status.update(escape(text))
        else:
            log.info("%s", text)

    def end(self) -> None:
        """Clears the line."""
        if self._status is not None:
            self._status.stop()


class _StderrLog(RotatingFileHandler):
    """A log file that is also this process's stderr. When a new file is begun, stderr moves to it."""

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        os.dup2(stream.fileno(), sys.stderr.fileno())
        return stream


def _up_log() -> Path:
    """The log of a detached stack's own process."""
    return stack_state.logs_dir(stack_state.state_dir()) / "up.log"


def _log_to(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
