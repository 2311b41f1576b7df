"""The demo's timeline: in the terminal and as a picture."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.demo.timeline import Mark, Sample, Timeline, WorkerSample, as_text, draw, in_words
from bench.quality.served import PlanShare, Rise, Window


def sample(seconds: float, phase: str, rate: float) -> Sample:
    plan = ("first", 4)
    return Sample(seconds, phase, (WorkerSample("worker-0", (plan,), (plan,), rate, cbc=5.0),))


def window(began: float, phase: str, increase: float, *shares: tuple[str, int, float]) -> Window:
    found = tuple(PlanShare(model, depth, share) for model, depth, share in shares)
    return Window(phase, began, 100, found, Rise(increase, 0.01, agreement=0.9, judged=16))


@pytest.fixture
def timeline() -> Timeline:
    """20 s. `first` at depth 4 is too bad on the second phase; from 14 s on requests get plans of `other`."""
    samples = [sample(seconds, "prose", 40.0) for seconds in range(1, 10)]
    samples += [sample(seconds, "technical", 80.0) for seconds in range(10, 20)]
    windows = [window(seconds, "prose", 0.01, ("first", 4, 1.0)) for seconds in range(10)]
    windows += [window(seconds, "technical", 0.8, ("first", 4, 1.0)) for seconds in range(10, 14)]
    windows += [
        window(seconds, "technical", 0.01, ("other", 2, 0.02), ("other", 8, 0.24), ("other", 16, 0.74))
        for seconds in range(14, 20)
    ]
    marks = [
        Mark(3, 5.0, "reassessment", moves=False, plan="first at depth 4", reason="it is the best"),
        Mark(4, 13.5, "confidence breach", moves=True, plan="other at depth 8", reason="cheaper"),
    ]
    phases = (("prose", 0.0, 10.0), ("technical", 10.0, 20.0))
    return Timeline(phases, tuple(samples), tuple(marks), 0.05, tuple(windows))


def rows(lines: list[str]) -> dict[str, str]:
    """The content of rows by their label, which is 12 columns wide. The row of phases has no label."""
    return {line[:12].strip(): line[12:] for line in reversed(lines)}


def test_terminal_shows_phases_shares_of_plans_and_decisions_at_their_time(timeline: Timeline) -> None:
    lines = as_text(timeline, 52)
    assert all(len(line) <= 52 for line in lines)
    assert lines[0][12:].index("|technical") == 20
    shown = rows(lines)
    assert shown["A at 4"].rstrip() == "█" * 28
    assert shown["B at 8"] == " " * 28 + "▃" * 12
    assert shown["B at 16"] == " " * 28 + "▆" * 12
    assert shown["decisions"].index("·") == 10
    assert shown["decisions"].index("▲") == 27
    # First half of the highest rate, then all of it.
    assert shown["tokens/s"][0] != shown["tokens/s"][-1] == "█"
    assert shown["ppl +%"][30] == shown["ppl +%"][0]
    assert shown["ppl +%"][22] == "█"


def test_plans_with_small_shares_are_shown_together(timeline: Timeline) -> None:
    few = ("other", 1, 0.02), ("other", 2, 0.02), ("first", 4, 0.96)
    lines = as_text(replace(timeline, windows=(window(0.0, "prose", 0.01, *few),)), 52)
    assert [line[:12].strip() for line in lines[1:3]] == ["A at 4", "others"]


def test_terminal_shows_a_run_without_a_single_decision(timeline: Timeline) -> None:
    quiet = Timeline(timeline.phases, timeline.samples[:1], (), None, timeline.windows[:1])
    assert rows(as_text(quiet, 40))["A at 4"].startswith("█")


def test_plans_in_words_name_each_model_once() -> None:
    assert in_words([("b", 8), ("a", 16), ("b", 2), ("b", 8)]) == "a at depth 16 and b at depth 2, 8"


def test_picture_is_a_png(timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    draw(timeline, path)
    assert path.read_bytes().startswith(b"\x89PNG")
