"""The timeline of a stack while traffic drifts: samples and decisions, as text and as a picture."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helios.rates import WINDOW_TOKENS

_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker's work since the previous sample. `cbc` is None when it generated nothing."""

    worker_id: str
    model: str
    depth: int
    tokens: int
    tokens_per_second: float
    cbc: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """All workers at one moment. `seconds` is the time since the traffic began.

    Quality is the mean of the served plans' quality on held-out text of the phase, weighted by their tokens.
    """

    seconds: float
    phase: str
    workers: tuple[WorkerSample, ...]
    perplexity_increase: float
    agreement: float

    @property
    def tokens(self) -> int:
        """Tokens generated since the previous sample."""
        return sum(worker.tokens for worker in self.workers)

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
    """The whole run. `phases`: the name of each, and the seconds at which it began and ended."""

    phases: tuple[tuple[str, float, float], ...]
    samples: tuple[Sample, ...]
    marks: tuple[Mark, ...]
    perplexity_bound: float | None

    @property
    def seconds(self) -> float:
        """How long the traffic lasted."""
        return self.phases[-1][2]

    @property
    def models(self) -> list[str]:
        """Every model that was served, in the order of their first appearance."""
        return list(dict.fromkeys(worker.model for sample in self.samples for worker in sample.workers))


def as_text(timeline: Timeline, width: int) -> list[str]:
    """The timeline in lines of at most `width` characters."""
    label = 12
    columns = max(20, width - label)
    buckets = _buckets(timeline, columns)
    letters = {model: chr(ord("A") + index) for index, model in enumerate(timeline.models)}

    def line(name: str, of_bucket: Callable[[Sequence[Sample]], str]) -> str:
        return f"{name:<{label}}" + "".join(of_bucket(bucket) if bucket else " " for bucket in buckets)

    def graph(name: str, value: Callable[[Sample], float | None]) -> list[str]:
        means = [_mean([value(sample) for sample in bucket]) for bucket in buckets]
        known = [mean for mean in means if mean is not None]
        if not known:
            return []
        low, high = min(0.0, *known), max(*known, 1e-9)
        cells = (" " if mean is None else _level(mean, low, high) for mean in means)
        return [f"{name:<{label}}{''.join(cells)}", f"{'':<{label}}{low:.4g} to {high:.4g}"]

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
    named = ", ".join(f"{letter} {model}" for model, letter in letters.items())
    return [
        f"{'':<{label}}{''.join(phases[:columns])}",
        line("model", lambda bucket: letters[bucket[-1].workers[0].model] if bucket[-1].workers else " "),
        f"{'':<{label}}{named}",
        *graph("depth", _depth),
        *graph("tokens/s", lambda sample: sample.tokens_per_second),
        *graph(f"CBC of {WINDOW_TOKENS}", lambda sample: sample.cbc),
        *graph("ppl +%", lambda sample: 100 * min(sample.perplexity_increase, most)),
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
    models: Mapping[str, str] = {model: f"C{index}" for index, model in enumerate(timeline.models)}
    for worker_id in dict.fromkeys(one.worker_id for sample in timeline.samples for one in sample.workers):
        points = [
            (sample.seconds, one)
            for sample in timeline.samples
            for one in sample.workers
            if one.worker_id == worker_id
        ]
        for (start, one), (end, after) in itertools.pairwise(points):
            plans.plot([start, end, end], [one.depth, one.depth, after.depth], color=models[one.model], lw=2)
        counted = [(seconds, one.cbc) for seconds, one in points if one.cbc is not None]
        if counted:
            counter.plot(*zip(*counted, strict=True), label=worker_id)
    for model, colour in models.items():
        plans.plot([], [], color=colour, lw=2, label=model)
    seconds = [sample.seconds for sample in timeline.samples]
    rate.plot(seconds, [sample.tokens_per_second for sample in timeline.samples], color="black")
    increases = [100 * sample.perplexity_increase for sample in timeline.samples]
    quality.plot(seconds, increases, color="black", label="perplexity")
    if timeline.perplexity_bound is not None:
        bound = 100 * timeline.perplexity_bound
        quality.axhline(bound, color="red", ls=":", label=f"bound, +{bound:g} %")
        # A wrong model is off by hundreds of percent, but the values near the bound matter.
        quality.set_yscale("symlog", linthresh=max(1.0, 2 * bound))
    quality.set_ylim(bottom=min([0.0, *increases]) - 1)
    deepest = max((one.depth for sample in timeline.samples for one in sample.workers), default=1)
    plans.set_ylim(0, 1.3 * deepest)
    rate.set_ylim(bottom=0)
    counter.set_ylim(0, WINDOW_TOKENS)
    for axes, name in (
        (plans, "depth (layers)"),
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


def _depth(sample: Sample) -> float | None:
    return _mean([float(worker.depth) for worker in sample.workers])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _level(value: float, low: float, high: float) -> str:
    return _LEVELS[round((value - low) / (high - low) * (len(_LEVELS) - 1))]
