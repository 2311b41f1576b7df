"""Available memory is counted within the limit of the container."""

from pathlib import Path

import pytest

from helios import hardware


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    return tmp_path


def test_available_memory_includes_the_page_cache(machine: Path) -> None:
    assert hardware.available_memory() == 4000 * 1024


@pytest.mark.parametrize(
    ("limit", "available"), [("max", 4000 * 1024), ("3000000", 2_000_000), ("900000", 0)]
)
def test_a_container_limit_binds(machine: Path, limit: str, available: int) -> None:
    (machine / "memory.max").write_text(limit + "\n")
    (machine / "memory.current").write_text("1000000\n")
    assert hardware.available_memory() == available
