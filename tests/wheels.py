"""Wheels that carry a model, and a folder of them that pip takes for its only index."""

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{licence}\nA package.\n"


def write_wheel(
    folder: Path,
    members: Mapping[str, bytes],
    *,
    name: str = "tiny-model",
    version: str = "1.0",
    licence: str = "License: Apache-2.0\n",
    record: Mapping[str, str] | None = None,
) -> Path:
    """Writes a wheel of these members. record: hashes to state instead of the true ones."""
    package = name.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    contents = {
        **members,
        f"{info}/METADATA": METADATA.format(name=name, version=version, licence=licence).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [
        f"{path},sha256={(record or {}).get(path) or digest(content)},{len(content)}"
        for path, content in contents.items()
    ]
    contents[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in contents.items():
            archive.writestr(path, content)
    return wheel


def digest(content: bytes) -> str:
    """As in RECORD."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def use_as_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pip look for packages in this folder and nowhere else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
