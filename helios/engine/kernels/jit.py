"""Compiles kernels, and caches their machine code.

Numba's own cache checks only the file that defines a function, not the operations and constants that the
function uses from other files. After an upgrade it would run old machine code that addresses memory in the
old layout. Here one hash over the sources of all kernels, and of everything that they import, names the
directory.
"""

import ast
import contextlib
import functools
import hashlib
import inspect
import logging
import os
import pickle
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit
from numba.core import sigutils
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

import helios
from helios.engine.kernels import processor
from helios.user_cache import user_cache

log = logging.getLogger(__name__)

VARIABLE = "HELIOS_KERNEL_CACHE_DIR"

# This file defines the kernels that Python calls. They call all others.
_ROOT = Path(__file__).with_name("border.py")
_PACKAGE = Path(helios.__file__).parent
# Suffix of the directories of machine code. Nothing without this suffix is ever removed.
_SUFFIX = ".kernels"
# Recently used directories stay: this many, and all used within this time, because other versions may still
# need them.
_KEPT_DIRECTORIES = 8
_KEPT_SECONDS = 24 * 3600.0
_DIGEST_BYTES = hashlib.sha256().digest_size


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a kernel at its first call, or loads its cached machine code.

    Kernels release the GIL, and divide by zero like NumPy. Raises TypeError for a function that the hash does
    not cover.
    """
    if Path(inspect.getfile(function)).resolve() not in SOURCES or function.__closure__ is not None:
        raise TypeError(
            f"{function.__qualname__} cannot be compiled: a kernel stands at the top of a module that "
            f"{_ROOT.name} imports"
        )
    kernel = njit(nogil=True, error_model="numpy")(function)
    # `enable_caching` does the same for Numba's own cache.
    kept = _Kept(function)
    kernel._cache = kept  # type: ignore[attr-defined]
    _KERNELS[kept.name] = kernel
    return kernel


def signatures() -> dict[str, list[Any]]:
    """The argument types for which this process has kernels, by kernel."""
    return {name: list(kernel.overloads) for name, kernel in _KERNELS.items() if kernel.overloads}


def compile_for(types_of: Mapping[str, Sequence[Any]]) -> None:
    """Compiles kernels for these `signatures` without running them."""
    for name, types in types_of.items():
        for one in types:
            _KERNELS[name].compile(one)


def _sources() -> tuple[Path, ...]:
    """Helios's source files on which machine code depends: all direct and indirect imports of the root."""
    found, waiting = set[Path](), [_ROOT.resolve()]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imports(file)
    return tuple(sorted(found))


def _imports(file: Path) -> Iterator[Path]:
    """The files of Helios that a file imports."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == _PACKAGE.name and parts:
                module = _PACKAGE.joinpath(*parts).with_suffix(".py")
                if module.is_file():
                    yield module.resolve()


def _version() -> str:
    """A hash of everything that machine code depends on, except for the processor."""
    versions = (helios.__version__, numba.__version__, llvmlite.__version__, sys.version)
    hashed = hashlib.sha256("\n".join(versions).encode())
    for file in SOURCES:
        content = file.read_bytes()
        hashed.update(f"\n{file.name} {len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()[:16]


_KERNELS: dict[str, Any] = {}
# Read before Python imports any kernel, so that what is compiled later comes from these files.
SOURCES = _sources()
_DIRECTORY = _version() + _SUFFIX


@dataclass(frozen=True, slots=True)
class _Places:
    """Directories of machine code for this version of the kernels."""

    read: tuple[Path, ...]
    # None: no directory is writable.
    written: Path | None


def describe() -> str:
    """Describes, for people, the target processors and the directory of machine code.

    Raises SettingsError when HELIOS_KERNEL_TARGET names no class of processors.
    """
    processor.check()
    target = processor.HOST if processor.TARGET is None else processor.TARGET.name
    found = _places()
    where = "nowhere" if found.written is None else f"in {found.written}"
    read = "".join(f", read from {path}" for path in found.read if path != found.written)
    return f"kernels are compiled for {target} and kept {where}{read}"


@functools.cache
def _places() -> _Places:
    """Finds the first of these directories that this user can write to. It and those before it are read.

    The candidates are $HELIOS_KERNEL_CACHE_DIR, helios/kernels in the user's cache directory, and a directory
    for temporary files.
    """
    read, chosen = [], os.environ.get(VARIABLE)
    if chosen:
        # Whoever chose this directory is responsible for who else may write to it.
        read.append(Path(chosen).absolute() / _DIRECTORY)
        if _make(read[0]):
            return _Places(tuple(read), read[0])
    for base in (user_cache("kernels"), _temporary_directory()):
        if base is not None:
            path = base / _DIRECTORY
            is_made = _make(path)
            if _is_own(path):
                read.append(path)
                if is_made:
                    return _Places(tuple(read), path)
    log.warning(
        "kernels that are compiled cannot be kept: each start that needs some takes a minute or more. "
        "Name a directory that can be written with %s",
        VARIABLE,
    )
    return _Places(tuple(read), None)


def _temporary_directory() -> Path | None:
    """This user's own directory among the temporary files. None if others can write to it."""
    try:
        path = Path(tempfile.gettempdir()) / f"helios-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    except OSError:
        return None
    return path if _is_own(path) else None


def _make(path: Path) -> bool:
    """Makes the directory if it is missing. Returns whether this user can write there."""
    try:
        is_new = not path.exists()
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        # Marks the directory as used: the least recently used ones are removed first.
        os.utime(path)
        if is_new:
            _tidy(path.parent)
    except OSError as error:
        log.debug("compiled kernels cannot be kept in %s: %s", path, error)
        return False
    return True


def _is_own(path: Path) -> bool:
    """Whether only this user and root can have put machine code into this directory."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid in (os.geteuid(), 0) and not facts.st_mode & 0o022


def _tidy(directory: Path) -> None:
    """Removes machine code that has not been used for a while. A version that needs it compiles it again."""
    versions = []
    for path in directory.iterdir():
        if re.fullmatch(rf"[0-9a-f]{{16}}{re.escape(_SUFFIX)}", path.name):
            with contextlib.suppress(FileNotFoundError):  # Another process removed it first.
                versions.append((path.stat().st_mtime, path))
    for used, path in sorted(versions, reverse=True)[_KEPT_DIRECTORIES:]:
        if used < time.time() - _KEPT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
            log.info("%s went: machine code of kernels that are not used any more", path)


@functools.cache
def _say_once(level: int, message: str, *arguments: object) -> None:
    log.log(level, message, *arguments)


class _Kept(_Cache):
    """The machine code of one kernel: one file per signature and processor.

    Numba's own cache also keeps an index. If two processes compile at once, the index of one can name the
    files of the other. Here the name of a file says what is in it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        module = function.__module__.rpartition(".")[2]
        self.name = f"{module}.{function.__qualname__}"
        self._is_enabled = True

    @property
    def cache_path(self) -> str | None:
        """The directory to which it is written."""
        written = _places().written
        return None if written is None else str(written)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel for these argument types. None: it must be compiled."""
        processor.check()
        target_context.refresh()
        if not self._is_enabled:
            return None
        name = self._file(sig, target_context.codegen())
        for directory in _places().read:
            content = _read(directory / name)
            if content is not None:
                return CompileResult._rebuild(target_context, *pickle.loads(content))
        _say_once(logging.INFO, "compiling kernels, once for this version: it takes a minute or more")
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Stores a compiled kernel. A failure is only logged, because this process has the kernel."""
        directory = _places().written
        if not self._is_enabled or directory is None:
            return
        if data.lifted or data.library.has_dynamic_globals:
            raise TypeError(f"{self.name} holds addresses of this process, so it cannot be kept")
        try:
            _write(directory / self._file(sig, data.codegen), dumps(data._reduce()))
        except OSError as error:
            _say_once(logging.WARNING, "compiled kernels cannot be kept in %s: %s", directory, error.strerror)

    def enable(self) -> None:
        """Reads and stores machine code from now on."""
        self._is_enabled = True

    def disable(self) -> None:
        """Neither reads nor stores machine code from now on."""
        self._is_enabled = False

    def flush(self) -> None:
        """Does nothing, because stored code stays valid."""

    def _file(self, sig: Any, codegen: Any) -> str:
        types, _ = sigutils.normalize_signature(sig)
        key = repr((types, codegen.magic_tuple()))
        return f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _read(file: Path) -> bytes | None:
    """Reads what `_write` wrote. None if the file is missing or damaged."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _say_once(logging.WARNING, "compiled kernels cannot be read from %s: %s", file.parent, error.strerror)
        return None
    digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        log.warning("the machine code in %s is damaged; it is compiled again", file)
        return None
    return content


def _write(file: Path, content: bytes) -> None:
    """Writes a file completely or not at all.

    It is not flushed to disk, because `_read` detects a file that a crash has cut short.
    """
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
    file.parent.mkdir(mode=0o755, exist_ok=True)
    try:
        unfinished.write_bytes(hashlib.sha256(content).digest() + content)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
