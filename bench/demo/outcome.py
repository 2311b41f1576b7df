"""The result of the demo: a row for each system and phase, and targets that were met or missed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from bench.demo.timeline import Timeline
from bench.demo.traffic import Phase
from bench.load import clients
from bench.load.clients import Stream
from bench.load.latency import Latency
from bench.results import Report, Target
from helios.slo import Slo

# Name of the row that sums up all phases of a system.
ALL = "all"
SYSTEMS = {
    "full": "the best candidate of each phase, all layers, continuous batching",
    "dynamic": "the same candidate, all layers loaded, each token leaves at its own exit",
    "HELIOS": "model and depth by the controller, which is not told of the phases",
}
# In seconds; as a share of the tokens; as a ratio of tokens a second.
_FOLLOW_TARGET, _WITHIN_TARGET, _RATIO_TARGET = 2.0, 0.95, 1.4
# A number of tokens with the same quality, their rise of perplexity, and their agreement.
Part = tuple[int, float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """How one system served one phase, or all of them. Its quality is compared with the best candidate's."""

    system: str
    phase: str
    streams: int
    failed: int
    # The reasons why streams failed, each once.
    errors: tuple[str, ...]
    seconds: float
    tokens_per_second: float
    ttft_ms: Latency
    tpot_ms: Latency
    perplexity_increase: float
    agreement: float
    # Share of the tokens that came from plans within the bound on perplexity.
    within_bound: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All results of the demo."""

    own_stack: bool
    workers: int
    timeline: Timeline
    # For every system: a row for each phase, then one for all phases.
    rows: tuple[Row, ...]
    # By phase: seconds until perplexity stayed within the bound. None: it never did.
    followed_after: Mapping[str, float | None]
    best: Mapping[str, str]

    def report(self) -> Report:
        """The outcome as a bench's report."""
        return Report({"systems": SYSTEMS, **asdict(self)}, self.targets())

    def targets(self) -> list[Target]:
        """The targets: the bound holds when traffic drifts, and HELIOS is faster than `full`."""
        helios = {row.phase: row for row in self.rows if row.system == "HELIOS"}
        full = next(row for row in self.rows if (row.system, row.phase) == ("full", ALL))
        phases = list(self.followed_after)
        later = [self.followed_after[phase] for phase in phases[1:]]
        slowest = max((math.inf if one is None else one for one in later), default=0.0)
        within = min(helios[phase].within_bound for phase in phases)
        ratio = helios[ALL].tokens_per_second / full.tokens_per_second if full.tokens_per_second else 0.0
        return [
            Target(
                "within the perplexity bound after a drift",
                f"at most {_FOLLOW_TARGET:g} s",
                ", ".join(
                    f"{phase} never" if one is None else f"{phase} {one:.1f} s"
                    for phase, one in zip(phases[1:], later, strict=True)
                ),
                slowest <= _FOLLOW_TARGET,
            ),
            Target(
                "tokens from plans within the bound, the worst phase",
                f"at least {_WITHIN_TARGET:.0%}",
                f"{within:.1%}",
                within >= _WITHIN_TARGET,
            ),
            Target(
                "throughput against full, all phases",
                f"at least {_RATIO_TARGET:g}x",
                f"{ratio:.2f}x",
                ratio >= _RATIO_TARGET,
            ),
        ]


def rows_of(
    system: str, served: Mapping[str, Sequence[Stream]], parts: Mapping[str, Sequence[Part]]
) -> list[Row]:
    """A row for each phase, and one for all phases. `parts`: tokens by their quality, for each phase."""
    rows = [_row(system, phase, streams, parts[phase]) for phase, streams in served.items()]
    every = [stream for streams in served.values() for stream in streams]
    together = _row(system, ALL, every, [part for of_phase in parts.values() for part in of_phase])
    # The time between phases does not count.
    seconds = math.fsum(row.seconds for row in rows)
    rate = tokens_of(every) / seconds if seconds else 0.0
    return [*rows, replace(together, seconds=seconds, tokens_per_second=rate)]


def _row(system: str, phase: str, streams: Sequence[Stream], parts: Sequence[Part]) -> Row:
    summary = clients.summarise(streams)
    tokens = sum(weight for weight, _, _ in parts)
    bound = Slo().max_perplexity_increase or math.inf
    nats = math.fsum(weight * math.log1p(increase) for weight, increase, _ in parts)
    agreement = math.fsum(weight * agreement for weight, _, agreement in parts)
    within = sum(weight for weight, increase, _ in parts if increase <= bound)
    return Row(
        system,
        phase,
        summary.streams,
        summary.failed,
        tuple(dict.fromkeys(stream.error for stream in streams if stream.error)),
        summary.seconds,
        summary.tokens_per_second,
        summary.ttft_ms,
        summary.tpot_ms,
        *(
            (math.expm1(nats / tokens), agreement / tokens, within / tokens)
            if tokens
            else (math.nan, math.nan, math.nan)
        ),
    )


def tokens_of(streams: Sequence[Stream]) -> int:
    """The number of tokens of all streams together."""
    return sum(len(stream.token_ids) for stream in streams)


def followed_after(phase: Phase, timeline: Timeline) -> float | None:
    """Seconds from the start of a phase until perplexity stayed within the bound. None: it never did."""
    bound = timeline.perplexity_bound
    began = next(began for name, began, _ in timeline.phases if name == phase.name)
    samples = [sample for sample in timeline.samples if sample.phase == phase.name]
    outside = [
        sample.seconds for sample in samples if bound is not None and sample.perplexity_increase > bound
    ]
    if not outside:
        return 0.0
    later = [sample.seconds for sample in samples if sample.seconds > outside[-1]]
    return later[0] - began if later else None
