"""Downloads models from the Hugging Face hub. Never runs a model's code."""

from pathlib import Path

from helios.architectures.registry import read_config
from helios.catalog import TOKENIZER_FILE
from helios.errors import SettingsError, UnavailableError, UnknownModelError
from helios.sources.folder import FILES
from helios.sources.sentencepiece import SENTENCEPIECE_FILE
from helios.weight_map import INDEX_SUFFIX, SINGLE_FILES


def download(repository: str, revision: str | None) -> Path:
    """Downloads a repository into the hub's cache and returns its folder there.

    First come the small files, which may reject the model, then the weights in the best format. The hub's
    library resumes downloads, and shows its own progress.

    Raises UnknownModelError when the hub has no such repository or revision; UnavailableError when the hub
    cannot be reached; CheckpointError when Helios cannot serve the model; SettingsError without
    huggingface_hub.
    """
    try:
        import httpx2  # noqa: PLC0415
        from huggingface_hub import errors, snapshot_download  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            "pulling from the hub needs huggingface_hub: install helios-serving[engine]"
        ) from error
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
        read_config(folder)
        if not (folder / TOKENIZER_FILE).exists():
            snapshot_download(repository, revision=folder.name, allow_patterns=[SENTENCEPIECE_FILE])
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
