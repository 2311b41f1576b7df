"""The folder in which benches keep peers' environments, random weights and logs."""

from pathlib import Path

CACHE_DIR = Path.home() / ".cache" / "helios"
