"""The result of the demo: a row for each system and phase, and targets that were met or missed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from bench.demo.timeline import Timeline
from bench.load import clients
from bench.load.clients import Stream
from bench.load.latency import Latency
from bench.quality.judge import FIRST_REQUESTS
from bench.quality.served import WINDOW_REQUESTS, WINDOW_SECONDS, Served, rise_over, tokens_within, windows
from bench.results import Report, Target
from helios.slo import Slo

# Name of the row that sums up all phases of a system.
ALL = "all"
FULL, DYNAMIC, SINGLE, HELIOS = "full", "dynamic", "single plan", "HELIOS"
SYSTEMS = {
    FULL: "the best candidate of each phase, all layers, continuous batching",
    DYNAMIC: "the same candidate, all layers loaded, each token leaves at its own exit",
    SINGLE: "HELIOS with one model and depth for all requests, by the controller (routing single)",
    HELIOS: "model and depth for each request; nothing is told of the phases",
}
# As a share of the tokens; as a ratio of tokens a second.
_WITHIN_TARGET, _RATIO_TARGET = 0.95, 1.8


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
    # Of `perplexity_increase`.
    error: float
    # The same over the first requests of the phase; of all phases, the highest.
    first_increase: float
    agreement: float
    # Share of the tokens in windows whose perplexity is within the bound.
    within_bound: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All results of the demo."""

    own_stack: bool
    workers: int
    # Of each system that follows the traffic.
    timelines: Mapping[str, Timeline]
    # For every system: a row for each phase, then one for all phases.
    rows: tuple[Row, ...]
    # By phase: the candidate with which all are compared.
    best: Mapping[str, str]

    def report(self) -> Report:
        """The outcome as a bench's report."""
        return Report({"systems": SYSTEMS, **asdict(self)}, self.targets())

    def targets(self) -> list[Target]:
        """The targets of HELIOS: the bound holds from each phase's first request, and it beats `full`."""
        helios = {row.phase: row for row in self.rows if row.system == HELIOS}
        full = next(row for row in self.rows if (row.system, row.phase) == (FULL, ALL))
        bound = _bound()
        within = min(helios[phase].within_bound for phase in self.best)
        ratio = helios[ALL].tokens_per_second / full.tokens_per_second if full.tokens_per_second else 0.0
        return [
            Target(
                f"perplexity over the first {FIRST_REQUESTS} requests of each phase",
                f"at most {bound:+.0%}",
                ", ".join(f"{phase} {helios[phase].first_increase:+.1%}" for phase in self.best),
                helios[ALL].first_increase <= bound,
            ),
            Target(
                f"tokens in windows within the bound (of at least {WINDOW_SECONDS:g} s and {WINDOW_REQUESTS} "
                "judged requests), the worst phase",
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
    system: str,
    streams: Mapping[str, Sequence[Stream]],
    served: Mapping[str, Sequence[Served]],
    references: Mapping[str, int],
) -> list[Row]:
    """A row for each phase, and one for all phases. All mappings are by phase.

    references: the candidate with which each phase's requests are compared.
    """
    rows = [
        _row(system, phase, streams[phase], {phase: requests}, references)
        for phase, requests in served.items()
    ]
    every = [stream for of_phase in streams.values() for stream in of_phase]
    together = _row(system, ALL, every, served, references)
    # The time between phases does not count.
    seconds = math.fsum(row.seconds for row in rows)
    rate = sum(len(stream.token_ids) for stream in every) / seconds if seconds else 0.0
    return [*rows, replace(together, seconds=seconds, tokens_per_second=rate)]


def _row(
    system: str,
    phase: str,
    streams: Sequence[Stream],
    served: Mapping[str, Sequence[Served]],
    references: Mapping[str, int],
) -> Row:
    summary = clients.summarise(streams)
    whole = rise_over([(one, references[of]) for of, requests in served.items() for one in requests])
    firsts = [
        rise_over([(one, references[of]) for one in requests[:FIRST_REQUESTS]]).increase
        for of, requests in served.items()
    ]
    found = [window for of, requests in served.items() for window in windows(of, requests, references[of])]
    tokens = sum(window.tokens for window in found)
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
        whole.increase,
        whole.error,
        max(firsts),
        whole.agreement,
        tokens_within(found, _bound()) / tokens if tokens else math.nan,
    )


def _bound() -> float:
    """The default bound, which holds during the demo."""
    bound = Slo().max_perplexity_increase
    return math.inf if bound is None else bound
