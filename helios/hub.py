"""Puts a checkpoint into the models directory, from the hub or a folder. Never runs the model's code."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from helios.architectures.registry import CONFIG_FILE, GENERATION_FILE, read_config
from helios.catalog import EXITS_FILE, FACTS_FILE, TOKENIZER_FILES, ModelEntry, find_model, read_model
from helios.errors import (
    InvalidRequestError,
    SettingsError,
    UnavailableError,
    UnknownModelError,
)
from helios.staging import check_free, staged
from helios.weight_map import INDEX_SUFFIX, SINGLE_FILES, WeightMap, read_safetensors_header

# Files that are downloaded before the weights. They are small, and enough to reject a model early.
_FACTS = (
    CONFIG_FILE,
    GENERATION_FILE,
    FACTS_FILE,
    EXITS_FILE,
    *TOKENIZER_FILES,
    "README.md",
    "LICENSE",
    "LICENSE.md",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# (name of a file, files placed so far, all files)
Progress = Callable[[str, int, int], None]


def pull(
    source: str,
    models_dir: Path,
    name: str | None = None,
    revision: str | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> ModelEntry:
    """Puts a model into the models directory and returns its entry.

    source: a folder, or else the id of a repository on the Hugging Face hub or in its local cache. The hub's
    library shows its own download progress. Safetensors are preferred to pickles. name: name in the models
    directory (default: the last part of the source). The model appears there only when it is complete and can
    be loaded at every depth (`helios.engine.plan.check_model`).

    Raises CheckpointError when the model cannot be loaded, or when the name is taken and not `force`;
    UnknownModelError when the hub has no such repository or revision; UnavailableError when the hub cannot be
    reached; SettingsError when the engine is not installed.
    """
    folder = Path(source).expanduser()
    is_folder = folder.is_dir()
    name = name or (folder.resolve().name if is_folder else source.rpartition("/")[2])
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name!r} cannot name a model: begin with a letter or digit, go on with these, '.', '_' and '-'"
        )
    target = models_dir / name
    check_free(target, replace=force)
    if is_folder and revision is not None:
        raise InvalidRequestError(f"{source} is a folder and has no revisions; leave out the revision")
    if not is_folder:
        folder = _download(source, revision)
    _check(folder)
    weights = WeightMap.read(folder)
    files = [*(folder / fact for fact in _FACTS if (folder / fact).is_file()), *weights.files]
    if weights.file_of is not None:
        files.append(folder / (SINGLE_FILES[0 if weights.is_safetensors else 1] + INDEX_SUFFIX))
    with staged(target, replace=force) as staging:
        for count, file in enumerate(files, 1):
            _place(file, staging / file.name, may_link=not is_folder)
            if progress is not None:
                progress(file.name, count, len(files))
        read_model(staging)
        if weights.is_safetensors:
            for file in weights.files:
                read_safetensors_header(staging / file.name)
    return find_model(models_dir, name)


def _check(folder: Path) -> None:
    """Raises CheckpointError unless the engine can load the model, SettingsError if there is no engine."""
    # Reports a missing file at once, before torch is imported.
    entry = read_model(folder)
    try:
        from helios.engine.plan import check_model  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            "pulling checks that the engine can load the model: install helios-serving[engine]"
        ) from error
    check_model(entry)


def _place(source: Path, target: Path, *, may_link: bool) -> None:
    if may_link:
        # The hub's cache never changes a file in place, so a hard link is safe.
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass  # Another file system, or one without hard links: copy instead.
    shutil.copyfile(source, target)


def _download(repository: str, revision: str | None) -> Path:
    """Downloads the repository into the hub's cache: facts first, then the weights in the best format."""
    try:
        import httpx2  # noqa: PLC0415
        from huggingface_hub import errors, snapshot_download  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            "pulling from the hub needs huggingface_hub: install helios-serving[engine]"
        ) from error
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(_FACTS)))
        read_config(folder)
        for single in SINGLE_FILES:
            stem, suffix = single.split(".")
            patterns = [single, single + INDEX_SUFFIX, f"{stem}-*.{suffix}"]
            # The folder's name is the commit, so facts and weights are from the same revision.
            snapshot_download(repository, revision=folder.name, allow_patterns=patterns)
            if (folder / single).exists() or (folder / (single + INDEX_SUFFIX)).exists():
                break
    except errors.HFValidationError as error:
        raise UnknownModelError(f"{repository!r} is neither a folder nor a repository id: {error}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UnknownModelError(
            f"no repository {repository}{at} on the hub, or none that you may read; check the name, or "
            "log in with `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise UnavailableError(
            f"{repository} could not be fetched and is not whole in the local cache; connect to the hub, or "
            f"pull from a folder ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    return folder
