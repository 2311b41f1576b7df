"""Where benches keep what they make once: peers' environments, random weights and logs."""

from pathlib import Path

CACHE_DIR = Path.home() / ".cache" / "helios"
