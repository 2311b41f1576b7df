"""Creates directories that appear completely or not at all."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from helios.errors import CheckpointError


@contextlib.contextmanager
def staged(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden directory that becomes `target` when the block ends, and is removed if the block fails.

    Raises CheckpointError when `target` exists and must not be replaced, or cannot be written.
    """
    check_free(target, replace=replace)
    mark = uuid.uuid4().hex[:8]
    # Hidden from the catalog, and on the target's file system so that the rename is atomic.
    staging = target.parent / f".{target.name}-{mark}"
    retired = target.parent / f".{target.name}-{mark}-replaced"
    try:
        staging.mkdir(parents=True)
        yield staging
        if target.exists():
            target.rename(retired)
        staging.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error}); choose another place") from error
    finally:
        if retired.exists() and not target.exists():
            retired.rename(target)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def check_free(target: Path, *, replace: bool) -> None:
    """Raises CheckpointError when `target` exists and must not be replaced."""
    if target.exists() and not replace:
        raise CheckpointError(f"{target} exists; choose another name, or --force to replace it")
