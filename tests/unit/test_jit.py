"""Cached machine code belongs to the current sources, is kept where possible, and is found again."""

import ctypes
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import helios
from helios.engine.kernels import jit, processor

PACKAGE = Path(helios.__file__).parent
# PR_CAPBSET_DROP and CAP_DAC_OVERRIDE. Without this capability, file modes apply to root too.
DROP, OVERRIDE = 24, 1

# Calls a small kernel in a separate process. Prints how much was compiled, and where code is kept.
CALL = """
import json, logging, sys
import numpy as np
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from helios.engine.kernels import jit
from helios.engine.kernels.context import longest_context
from helios.engine.kernels.layout import BatchAddresses
positions = np.array([3, 41, 7])
batch = BatchAddresses(3, 3, 3, 0, positions.ctypes.data, 0, 0, 0, 0, 0)
print(json.dumps({
    "result": int(longest_context(batch)),
    "compiled": sum(longest_context.stats.cache_misses.values()),
    "where": jit.describe(),
}))
"""
DESCRIBE = "from helios.engine.kernels import jit; print(jit.describe())"


class Copy:
    """A copy of the package in which sources can be changed, and a cache directory beside it."""

    def __init__(self, directory: Path) -> None:
        self.package, self.home = directory / "helios", directory / "home"
        self.temporary = directory / "temporary"
        self.home.mkdir()
        self.temporary.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", "v1", "cli")
        shutil.copytree(PACKAGE, self.package, ignore=ignored)
        # Empty, so that torch and the rest of the engine are not imported, which takes seconds.
        (self.package / "engine/__init__.py").write_text("")

    @property
    def kept(self) -> Path:
        """The directory of kernels in the user's cache directory."""
        return self.home / ".cache/helios/kernels"

    def change(self, file: str, old: str, new: str) -> None:
        path = self.package / file
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = {"HOME": str(self.home), "TMPDIR": str(self.temporary), "PYTHONPATH": str(self.package.parent)}
        return subprocess.run(
            [sys.executable, "-c", script],
            env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **own, **variables},
            cwd=self.package.parent,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(DROP, OVERRIDE, 0, 0, 0),
        )

    def call(self, **variables: str) -> dict[str, Any]:
        ran = self.run(CALL, **variables)
        assert ran.returncode == 0, ran.stderr
        found: dict[str, Any] = json.loads(ran.stdout)
        return {**found, "log": ran.stderr}

    def describe(self, **variables: str) -> str:
        ran = self.run(DESCRIBE, **variables)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def without_writing(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_changed_operation_runs_without_a_change_of_the_kernel_that_takes_it(copy: Copy) -> None:
    first = copy.call()
    assert (first["result"], first["compiled"]) == (42, 1)
    again = copy.call()
    assert (again["result"], again["compiled"]) == (42, 0)

    copy.change(
        "engine/kernels/simd.py",
        "load_long = operation(types.int64, (types.intp, types.intp), _load(ir.IntType(64)))",
        "load_long = operation(types.int64, (types.intp, types.intp), "
        "lambda b, v: b.neg(_load(ir.IntType(64))(b, v)))",
    )
    changed = copy.call()
    assert (changed["result"], changed["compiled"]) == (0, 1)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("errors.py", 'DOMAIN = "helios"', 'DOMAIN = "other"'),
        ("engine/kernels/layout.py", "FLOAT16 = 0, 1, 2, 3", "FLOAT16 = 0, 2, 1, 3"),
        ("engine/kernels/inner_product.py", "TILE = 2 * LANES", "TILE = 4 * LANES"),
        ("engine/kernels/processors/avx2.py", '"x86-64-v3"', '"haswell"'),
        ("__init__.py", '__version__ = "', '__version__ = "9'),
    ],
)
def test_machine_code_is_kept_for_sources_constants_and_versions(
    copy: Copy, file: str, old: str, new: str
) -> None:
    before = copy.describe()
    copy.change(file, old, new)
    assert copy.describe() != before


def test_what_kernels_do_not_use_leaves_machine_code_as_it_is() -> None:
    names = {path.relative_to(PACKAGE).as_posix() for path in jit.SOURCES}
    others = {"__init__", "team"}
    kernels = {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "engine/kernels").rglob("*.py")}
    kernels = {name for name in kernels if Path(name).stem not in others}
    assert names >= {"errors.py", *kernels}
    assert not names & {"engine/engine.py", "engine/backends/compiled.py", "settings.py"}


def test_a_kernel_that_the_hash_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="at the top of a module that"):
        jit.compiled(test_a_kernel_that_the_hash_does_not_know_is_refused)


def test_damaged_machine_code_is_compiled_anew(copy: Copy) -> None:
    copy.call()
    (file,) = copy.kept.rglob("context.longest_context-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    found = copy.call()
    assert (found["result"], found["compiled"]) == (42, 1)
    assert "damaged" in found["log"]
    assert copy.call()["compiled"] == 0


def test_delivered_machine_code_is_read_where_nothing_can_be_written(copy: Copy, tmp_path: Path) -> None:
    delivered = tmp_path / "delivered"
    assert copy.call(HELIOS_KERNEL_CACHE_DIR=str(delivered))["compiled"] == 1
    assert not copy.kept.exists()
    for directory in (delivered, copy.home, copy.package):
        without_writing(directory)

    found = copy.call(HELIOS_KERNEL_CACHE_DIR=str(delivered))
    assert (found["result"], found["compiled"]) == (42, 0)
    assert f"read from {delivered}" in found["where"]


def test_a_user_without_a_home_keeps_machine_code_in_a_directory_of_their_own(
    copy: Copy, tmp_path: Path
) -> None:
    without_writing(copy.home)
    assert copy.call()["compiled"] == 1
    assert copy.call()["compiled"] == 0
    own = copy.temporary / f"helios-{os.geteuid()}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700

    # Another user could have put machine code there.
    own.chmod(0o777)
    found = copy.call()
    assert (found["result"], found["compiled"]) == (42, 1)
    assert "HELIOS_KERNEL_CACHE_DIR" in found["log"]
    assert "kept nowhere" in found["where"]


def test_machine_code_that_others_can_have_put_there_is_not_read(copy: Copy) -> None:
    assert copy.call()["compiled"] == 1
    (version,) = copy.kept.iterdir()
    version.chmod(0o777)

    found = copy.call()
    assert found["compiled"] == 1
    assert str(version) not in found["where"]


def test_machine_code_of_versions_that_are_gone_goes_when_a_new_one_comes(copy: Copy) -> None:
    versions = [copy.kept / f"{number:016x}.kernels" for number in range(12)]
    for number, version in enumerate(versions):
        version.mkdir(parents=True)
        (version / "step.run_burst-0123456789abcdef").touch()
        # The last version still runs beside a newer one.
        seconds = (30 - number) * 24 * 3600
        os.utime(version, (version.stat().st_mtime - seconds,) * 2)
    (copy.kept / "other").mkdir()
    copy.describe()

    left = {path.name for path in copy.kept.iterdir()}
    assert len(left) == 9 and "other" in left
    assert {version.name for version in versions[-7:]} < left


def test_versions_in_use_stay_however_many_there_are(copy: Copy) -> None:
    for number in range(12):
        (copy.kept / f"{number:016x}.kernels").mkdir(parents=True)
    copy.describe()
    assert len(list(copy.kept.iterdir())) == 13


COMPILE = """
import sys
from numba import types
from helios.engine.kernels import jit, processor
from helios.engine.kernels.context import longest_context as kernel
from helios.engine.kernels.layout import BatchAddresses
batch = types.NamedUniTuple(types.int64, len(BatchAddresses._fields), BatchAddresses)
wanted = {"context.longest_context": [(batch,)]}
jit.compile_for(wanted)
assert {name: jit.signatures()[name] for name in wanted} == wanted
print(processor.TARGET.name, processor.has_byte_dot_product(), sum(kernel.stats.cache_misses.values()))
"""


@pytest.mark.skipif(processor.TARGET is None, reason="there are classes of x86-64 alone")
def test_code_for_other_processors_is_compiled_here_and_found_there(copy: Copy) -> None:
    told = [
        [copy.run(COMPILE, HELIOS_KERNEL_TARGET=target.name).stdout.split() for _ in range(2)]
        for target in processor.TARGETS
    ]
    assert told == [
        [[target.name, str("avx512vnni" in target.features), misses] for misses in ("1", "0")]
        for target in processor.TARGETS
    ]
    assert processor.TARGET is not None
    assert copy.call()["compiled"] == 0  # this machine's class was compiled
    assert copy.call(HELIOS_KERNEL_TARGET="host")["result"] == 42

    ran = copy.run(DESCRIBE, HELIOS_KERNEL_TARGET="z80")
    assert "HELIOS_KERNEL_TARGET is 'z80'; use one of avx512-bf16" in ran.stderr
