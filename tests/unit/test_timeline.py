"""The demo's timeline: in the terminal and as a picture."""

from pathlib import Path

import pytest

from bench.demo.timeline import Mark, Sample, Timeline, WorkerSample, as_text, draw


def sample(seconds: float, phase: str, model: str, depth: int, increase: float = 0.01) -> Sample:
    worker = WorkerSample("worker-0", model, depth, tokens=100, tokens_per_second=10.0 * depth, cbc=5.0)
    return Sample(seconds, phase, (worker,), increase, 0.9)


@pytest.fixture
def timeline() -> Timeline:
    """20 s. `first` at depth 4 is too bad on the second phase; `other` at depth 8 takes over at 14 s."""
    samples = [sample(seconds, "prose", "first", 4) for seconds in range(1, 10)]
    samples += [sample(seconds, "technical", "first", 4, 0.8) for seconds in range(10, 14)]
    samples += [sample(seconds, "technical", "other", 8) for seconds in range(14, 20)]
    marks = [
        Mark(3, 5.0, "reassessment", moves=False, plan="first at depth 4", reason="it is the best"),
        Mark(4, 13.5, "confidence breach", moves=True, plan="other at depth 8", reason="cheaper"),
    ]
    return Timeline((("prose", 0.0, 10.0), ("technical", 10.0, 20.0)), tuple(samples), tuple(marks), 0.05)


def rows(lines: list[str]) -> dict[str, str]:
    """The content of rows by their label, which is 12 columns wide. The row of phases has no label."""
    return {line[:12].strip(): line[12:] for line in reversed(lines)}


def test_terminal_shows_phases_models_depths_and_decisions_at_their_time(timeline: Timeline) -> None:
    lines = as_text(timeline, 52)
    assert all(len(line) <= 52 for line in lines)
    assert lines[0][12:].index("|technical") == 20
    shown = rows(lines)
    assert shown["model"].count("A") + shown["model"].count("B") == 40
    assert 26 <= shown["model"].index("B") <= 28
    assert shown["decisions"].index("·") == 10
    assert shown["decisions"].index("▲") == 27
    # First half of the greatest depth, then all of it.
    assert shown["depth"][0] != shown["depth"][-1] == "█"
    assert shown["ppl +%"][30] == shown["ppl +%"][0]
    assert shown["ppl +%"][22] == "█"


def test_terminal_shows_a_run_without_a_single_decision(timeline: Timeline) -> None:
    quiet = Timeline(timeline.phases, timeline.samples[:1], (), None)
    assert rows(as_text(quiet, 40))["model"].startswith("A")


def test_picture_is_a_png(timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    draw(timeline, path)
    assert path.read_bytes().startswith(b"\x89PNG")
