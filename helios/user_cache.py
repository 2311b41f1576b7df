"""The directory for reproducible data of this user's processes: the user's cache (XDG base directories)."""

import os
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """helios/`name` in the user's cache directory. It may not exist. None: the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "helios" / name
    except RuntimeError:
        return None
