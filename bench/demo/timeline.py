"""The timeline of a stack while traffic drifts: samples, windows and decisions, as text and as a picture."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.quality.served import Window
from helios.rates import WINDOW_TOKENS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = "▁▂▃▄▅▆▇█"
# Plans that never have this share of a window's tokens are shown together.
_SMALL_SHARE = 0.05
# Colour maps, one for each model. Deeper plans are darker.
_COLOUR_MAPS = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker's work since the previous sample. `cbc` is None when it generated nothing.

    plans: model and depth of those in force. running: those of them that have sequences.
    """

    worker_id: str
    plans: tuple[tuple[str, int], ...]
    running: tuple[tuple[str, int], ...]
    tokens_per_second: float
    cbc: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """All workers at one moment. `seconds` is the time since the traffic began."""

    seconds: float
    phase: str
    workers: tuple[WorkerSample, ...]

    @property
    def tokens_per_second(self) -> float:
        """The rate of all workers together."""
        return sum(worker.tokens_per_second for worker in self.workers)

    @property
    def cbc(self) -> float | None:
        """The highest of the workers' breach counters."""
        return max((worker.cbc for worker in self.workers if worker.cbc is not None), default=None)


@dataclass(frozen=True, slots=True)
class Mark:
    """A decision. `seconds` is the time since the traffic began."""

    number: int
    seconds: float
    trigger: str
    moves: bool
    plan: str
    reason: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """The whole run. `phases`: the name of each, and the seconds at which it began and ended.

    windows: what was served, with its quality. Empty while that is not known yet. All times are in seconds
    since the traffic began.
    """

    phases: tuple[tuple[str, float, float], ...]
    samples: tuple[Sample, ...]
    marks: tuple[Mark, ...]
    perplexity_bound: float | None
    windows: tuple[Window, ...] = ()

    @property
    def seconds(self) -> float:
        """How long the traffic lasted."""
        return self.phases[-1][2]

    @property
    def plans(self) -> list[tuple[str, int]]:
        """Model and depth of every plan that was served, in order."""
        return sorted({(one.model, one.depth) for window in self.windows for one in window.shares})

    @property
    def models(self) -> list[str]:
        """Every model that was served, in order."""
        return sorted({model for model, _ in self.plans})


def in_words(plans: Iterable[tuple[str, int]]) -> str:
    """Plans (model and depth) in words, each model once."""
    by_model = itertools.groupby(sorted(set(plans)), key=lambda plan: plan[0])
    depths = {model: ", ".join(str(depth) for _, depth in group) for model, group in by_model}
    return " and ".join(f"{model} at depth {found}" for model, found in depths.items())


def as_text(timeline: Timeline, width: int) -> list[str]:
    """The timeline in lines of at most `width` characters."""
    label = 12
    columns = max(20, width - label)
    buckets = _buckets(timeline, columns)
    windows = [_window_at(timeline, (column + 0.5) / columns * timeline.seconds) for column in range(columns)]

    def graph(name: str, values: Sequence[float | None]) -> list[str]:
        known = [value for value in values if value is not None and not math.isnan(value)]
        if not known:
            return []
        low, high = min(0.0, *known), max(*known, 1e-9)
        cells = (" " if value is None or math.isnan(value) else _level(value, low, high) for value in values)
        return [f"{name:<{label}}{''.join(cells)}", f"{'':<{label}}{low:.4g} to {high:.4g}"]

    def samples(value: Callable[[Sample], float | None]) -> list[float | None]:
        return [_mean([value(sample) for sample in bucket]) for bucket in buckets]

    phases = [" "] * columns
    for name, began, _ in timeline.phases:
        start = min(columns - 1, int(began / timeline.seconds * columns))
        phases[start : start + len(name) + 1] = list(f"|{name}")
    marks = [" "] * columns
    for mark in timeline.marks:
        column = min(columns - 1, int(mark.seconds / timeline.seconds * columns))
        marks[column] = "▲" if mark.moves or marks[column] == "▲" else "·"
    # A wrong model is off by hundreds of percent, but the values near the bound matter.
    most = math.inf if timeline.perplexity_bound is None else 4 * timeline.perplexity_bound
    letters = {model: chr(ord("A") + at) for at, model in enumerate(timeline.models)}
    lines = [f"{'':<{label}}{''.join(phases[:columns])}"]
    for plans in _rows(timeline):
        name = f"{letters[plans[0][0]]} at {plans[0][1]}" if len(plans) == 1 else "others"
        shares = [0.0 if window is None else _share(window, plans) for window in windows]
        lines.append(f"{name:<{label}}{''.join(_level(one, 0.0, 1.0) if one else ' ' for one in shares)}")
    models = ", ".join(f"{letter} {model}" for model, letter in letters.items())
    return [
        *lines,
        f"{'':<{label}}share of the tokens by model and depth",
        f"{'':<{label}}{models}",
        *graph("tokens/s", samples(lambda sample: sample.tokens_per_second)),
        *graph(f"CBC of {WINDOW_TOKENS}", samples(lambda sample: sample.cbc)),
        *graph("ppl +%", [100 * min(window.rise.increase, most) if window else None for window in windows]),
        f"{'decisions':<{label}}{''.join(marks)}",
        f"{'':<{label}}▲ another plan, · looked and kept it",
    ]


def draw(timeline: Timeline, path: Path) -> None:
    """Writes the picture as PNG. Raises ModuleNotFoundError without matplotlib, OSError if writing fails."""
    import matplotlib as mpl  # noqa: PLC0415  # Only a picture needs it.
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.use("agg")
    figure = Figure(figsize=(11, 9), layout="constrained")
    plans, rate, counter, quality = figure.subplots(4, 1, sharex=True)
    _draw_shares(timeline, plans)
    for worker_id in dict.fromkeys(one.worker_id for sample in timeline.samples for one in sample.workers):
        counted = [
            (sample.seconds, one.cbc)
            for sample in timeline.samples
            for one in sample.workers
            if one.worker_id == worker_id and one.cbc is not None
        ]
        if counted:
            counter.plot(*zip(*counted, strict=True), label=worker_id)
    seconds = [sample.seconds for sample in timeline.samples]
    rate.plot(seconds, [sample.tokens_per_second for sample in timeline.samples], color="black")
    starts, windows = _steps(timeline)
    increases = [100 * window.rise.increase for window in windows]
    quality.step(starts, increases, where="post", color="black", label="perplexity")
    if timeline.perplexity_bound is not None:
        bound = 100 * timeline.perplexity_bound
        quality.axhline(bound, color="red", ls=":", label=f"bound, +{bound:g} %")
        # A wrong model is off by hundreds of percent, but the values near the bound matter.
        quality.set_yscale("symlog", linthresh=max(1.0, 2 * bound))
    quality.set_ylim(bottom=min([0.0, *(one for one in increases if not math.isnan(one))]) - 1)
    rate.set_ylim(bottom=0)
    counter.set_ylim(0, WINDOW_TOKENS)
    for axes, name in (
        (plans, "share of the tokens, %"),
        (rate, "tokens/s"),
        (counter, f"CBC\n(unsure of {WINDOW_TOKENS})"),
        (quality, "perplexity over the best\ncandidate at full depth, %"),
    ):
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        for index, (_, began, ended) in enumerate(timeline.phases):
            axes.axvspan(began, ended, color="grey", alpha=0.15 if index % 2 else 0.05, lw=0)
        for mark in timeline.marks:
            axes.axvline(mark.seconds, color="green" if mark.moves else "grey", lw=1, ls="--", alpha=0.7)
        if axes is not rate:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    for name, began, ended in timeline.phases:
        plans.annotate(
            name, ((began + ended) / 2, 0.9), xycoords=("data", "axes fraction"), ha="center", weight="bold"
        )
    for mark in timeline.marks:
        if mark.moves:
            plans.annotate(
                f" {mark.number} {mark.trigger}",
                (mark.seconds, 0.03),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=7,
            )
    quality.set_xlim(0, timeline.seconds)
    quality.set_xlabel("seconds (dashed: decisions; green: another plan)")
    figure.savefig(path, dpi=110, format="png")


def _draw_shares(timeline: Timeline, axes: "Axes") -> None:
    """The shares of the plans over time, one above the other."""
    import matplotlib as mpl  # noqa: PLC0415  # Only a picture needs it.

    rows = _rows(timeline)
    deepest = max((depth for _, depth in timeline.plans), default=1)
    names, colours = [], []
    for (model, depth), *others in rows:
        names.append("other plans" if others else f"{model} at {depth}")
        colour_map = _COLOUR_MAPS[timeline.models.index(model) % len(_COLOUR_MAPS)]
        colours.append("lightgrey" if others else mpl.colormaps[colour_map](0.25 + 0.65 * depth / deepest))
    starts, windows = _steps(timeline)
    shares = [[100 * _share(window, plans) for window in windows] for plans in rows]
    axes.stackplot(starts, shares, labels=names, colors=colours, step="post")
    # Above them are the names of the phases.
    axes.set_ylim(0, 115)


def _rows(timeline: Timeline) -> list[list[tuple[str, int]]]:
    """The plans that are shown one by one, each alone, then all others together."""
    large = {
        (one.model, one.depth)
        for window in timeline.windows
        for one in window.shares
        if one.share >= _SMALL_SHARE
    }
    alone = [[plan] for plan in timeline.plans if plan in large]
    others = [plan for plan in timeline.plans if plan not in large]
    return [*alone, others] if others else alone


def _share(window: Window, plans: Sequence[tuple[str, int]]) -> float:
    return math.fsum(one.share for one in window.shares if (one.model, one.depth) in plans)


def _steps(timeline: Timeline) -> tuple[list[float], list[Window]]:
    """Where windows begin, and the windows. The last one comes again at the end of the timeline."""
    windows = [*timeline.windows, *timeline.windows[-1:]]
    return [*(window.began for window in timeline.windows), timeline.seconds][: len(windows)], windows


def _window_at(timeline: Timeline, seconds: float) -> Window | None:
    """The last window that had begun by then. None: the first one had not."""
    begun = [window for window in timeline.windows if window.began <= seconds]
    return begun[-1] if begun else None


def _buckets(timeline: Timeline, columns: int) -> list[list[Sample]]:
    buckets: list[list[Sample]] = [[] for _ in range(columns)]
    for sample in timeline.samples:
        buckets[min(columns - 1, int(sample.seconds / timeline.seconds * columns))].append(sample)
    # A sample covers the time since the previous one. The last sample also covers the time after it.
    filled: list[list[Sample]] = []
    last = list(timeline.samples[-1:])
    for bucket in reversed(buckets):
        last = bucket or last
        filled.append(last)
    return filled[::-1]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _level(value: float, low: float, high: float) -> str:
    return _LEVELS[round((value - low) / (high - low) * (len(_LEVELS) - 1))]
