"""Measures loading: the first load, from packed weights, and beside a plan that shares weights.

It runs in its own process: `python -m bench.engine.loading MODEL PRECISION THREADS`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helios.catalog import read_model
from helios.errors import HeliosError
from helios.tether import tethered

PRECISION = "int8"
_MEMORY_BYTES = 4 << 30
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Loading:
    """Seconds until a plan with all layers, or half of them, can serve, and the bytes that were read.

    The files are on disk and not in the page cache, unless a field says otherwise.
    """

    checkpoint_bytes: int
    # Time to read the checkpoint's files, and nothing else.
    read_seconds: float
    first_seconds: float
    packed_bytes: int
    packed_seconds: float
    # Load from packed weights that are still in memory, as a second worker does.
    shared_seconds: float
    # Change from half of the layers to all, and back, without packed weights on disk.
    deeper_bytes: int
    deeper_seconds: float
    shallower_bytes: int
    shallower_seconds: float


def measure(model: Path, threads: int) -> Loading:
    """Measures the loads of a model. Raises HeliosError when one fails."""
    done = subprocess.run(
        tethered([sys.executable, "-P", "-m", "bench.engine.loading", str(model), PRECISION, str(threads)]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HeliosError(f"loading {model.name} was not measured: {done.stderr.strip()}")
    return Loading(**json.loads(done.stdout))


def in_words(loading: dict[str, Any]) -> str:
    """A Loading, given as a dict, as one line of a report."""
    return (
        "first {first_seconds:.2f} s (reading its {checkpoint_bytes:,} bytes alone {read_seconds:.2f}); "
        "packed on disk {packed_seconds:.2f} s, in memory {shared_seconds:.2f}; half to all layers "
        "{deeper_seconds:.2f} s ({deeper_bytes:,} bytes), back {shallower_seconds:.2f} s"
    ).format(**loading)


def main() -> None:
    """Writes the Loading as JSON to stdout."""
    from helios.engine.plan import Plan, load_plan  # noqa: PLC0415
    from helios.engine.settings import EngineSettings  # noqa: PLC0415
    from helios.engine.threads import set_threads  # noqa: PLC0415

    model, precision = Path(sys.argv[1]), sys.argv[2]
    set_threads(int(sys.argv[3]), precision)
    files = [file for file in model.iterdir() if file.suffix in (".safetensors", ".bin")]
    with tempfile.TemporaryDirectory() as directory:
        packed = Path(directory)

        def load(depth: int | None, running: Plan | None = None, *, kept: bool = True) -> tuple[Plan, float]:
            settings = EngineSettings(
                precision=precision,
                memory_bytes=_MEMORY_BYTES,
                packed_cache_dir=packed,
                packed_cache_bytes=1 << 40 if kept else 0,
            )
            began = time.perf_counter()
            plan = load_plan(model, depth, settings, running=running)
            return plan, time.perf_counter() - began

        # This load also compiles kernels, so that later loads do not.
        half, _ = load(_half(model), kept=False)
        _forget(files)
        read_seconds = _read(files)
        _forget(files)
        whole, first_seconds = load(None)
        checkpoint_bytes, layers = whole.bytes_read, whole.depth
        # A mapped file cannot be dropped from the page cache, so the mapping must end.
        del whole
        _forget(packed.glob("*/*"))
        whole, packed_seconds = load(None)
        _, shared_seconds = load(None)
        packed_bytes = whole.bytes_read
        deeper, deeper_seconds = load(layers, half, kept=False)
        shallower, shallower_seconds = load(half.depth, deeper, kept=False)
        found = Loading(
            checkpoint_bytes=checkpoint_bytes,
            read_seconds=read_seconds,
            first_seconds=first_seconds,
            packed_bytes=packed_bytes,
            packed_seconds=packed_seconds,
            shared_seconds=shared_seconds,
            deeper_bytes=deeper.bytes_read,
            deeper_seconds=deeper_seconds,
            shallower_bytes=shallower.bytes_read,
            shallower_seconds=shallower_seconds,
        )
    sys.stdout.write(json.dumps(asdict(found)))


def _half(model: Path) -> int:
    """The exit layer nearest to half of the layers."""
    entry = read_model(model)
    return min(entry.exit_layers, key=lambda layer: abs(2 * layer - entry.num_layers))


def _forget(files: Iterable[Path]) -> None:
    """Drops files from the page cache (posix_fadvise(2))."""
    for file in files:
        with file.open("rb") as stream:
            # Only pages that are already on disk can be dropped.
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(files: Iterable[Path]) -> float:
    """Reads whole files. Returns the seconds that this took."""
    began, buffer = time.perf_counter(), bytearray(_READ_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
