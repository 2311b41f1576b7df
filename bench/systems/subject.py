"""The subject of the engine's benches: models, held-out texts, sizes, and traces computed once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.systems.cache import CACHE_DIR
from bench.texts import held_out
from helios.catalog import ModelEntry
from helios.engine import Engine, EngineSettings, ExitMode
from helios.engine.evaluation.trace import ExitTrace, trace_exits
from helios.engine.plan import Plan, load_plan
from helios.engine.tokenizer import load_tokenizer
from helios.errors import SettingsError
from helios.modes import Precision
from helios.settings import SERVED_BURST_SECONDS


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. All are counts. `windows` is per domain; None: all that the texts give."""

    batches: tuple[int, ...] = (1, 8, 32, 64)
    prompt_tokens: int = 32
    output_tokens: int = 64
    rounds: int = 3
    saturating_requests: int = 128
    # Few, because one at a time takes long, and the rate does not depend on their number.
    single_requests: int = 6
    window_tokens: int = 256
    windows: int | None = None
    judged_requests: int = 16
    forced_windows: int = 32
    forced_tokens: int = 128
    grid_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    request_tokens: int = 64
    # The beginning of a request, which a probe reads.
    probed_tokens: int = 30
    # Requests in a phase of drifting traffic. A drift must not fall on a reassessment, because the reaction
    # would then look better than it is.
    phase_requests: int = 310
    # Requests in a phase of the long traces, and in traffic without a drift.
    long_phase_requests: int = 3000
    # Number of traces of each shape, and of those that are long or only serve comparisons.
    traces: int = 20
    few_traces: int = 5
    # Requests in a phase, and number of traces, where a router learns while it serves.
    learning_phase_requests: int = 3334
    learning_traces: int = 2
    # Requests of a domain that no model and no router has seen.
    unseen_requests: int = 64
    served_requests: int = 120
    served_interval: int = 20
    profiled_requests: int = 5
    # The shape with random weights, and the sizes for its measurements.
    shape: str = "opt-1.3b"
    shape_batches: tuple[int, ...] = (1, 8, 32)
    shape_tokens: int = 16
    # More than the profiler times, because a whole simulation depends on them.
    timed_steps: int = 21
    reloads: int = 100
    # Seconds of a round on real services, and how many times four rounds are run.
    control_seconds: float = 20.0
    control_rounds: int = 2
    # A plan for each request, on real services: streams at once, requests after which the router may be
    # ready, seconds to wait for it, requests of a round, and those whose first token is timed one at a time.
    routed_streams: int = 32
    routed_learning: int = 100
    learning_seconds: float = 30.0
    routed_requests: int = 400
    ttft_requests: int = 40

    @property
    def largest_batch(self) -> int:
        """The batch that saturates an engine here."""
        return self.batches[-1]


QUICK = Sizes(
    batches=(1, 4),
    prompt_tokens=8,
    output_tokens=8,
    rounds=1,
    saturating_requests=8,
    single_requests=2,
    window_tokens=64,
    windows=6,
    judged_requests=2,
    forced_windows=2,
    forced_tokens=16,
    grid_batches=(1, 2, 4),
    request_tokens=16,
    probed_tokens=7,
    phase_requests=12,
    long_phase_requests=24,
    traces=2,
    few_traces=1,
    learning_phase_requests=24,
    learning_traces=1,
    unseen_requests=8,
    served_requests=9,
    served_interval=3,
    profiled_requests=2,
    shape="tiny",
    shape_batches=(1, 2),
    shape_tokens=4,
    timed_steps=2,
    reloads=6,
    control_seconds=0.5,
    control_rounds=1,
    routed_streams=4,
    routed_learning=8,
    learning_seconds=0.5,
    routed_requests=8,
    ttft_requests=2,
)


@dataclass(frozen=True, slots=True)
class Quality:
    """The teacher-forced quality of a model at one depth on held-out text."""

    perplexity: float
    nats_per_byte: float
    # Relative to the best candidate at full depth, per token of that candidate. The policy bounds this.
    perplexity_increase: float
    # Share of tokens that are the same as those of the model's own last layer.
    agreement: float


class Subject:
    """The models that are measured. Each model is loaded and traced once."""

    def __init__(
        self,
        models: Sequence[ModelEntry],
        sizes: Sizes,
        memory_bytes: int,
        say: Callable[[str], None] = lambda _: None,
        precision: Precision = Precision.FLOAT32,
        cache_dir: Path = CACHE_DIR,
    ) -> None:
        """memory_bytes: budget of each engine. cache_dir: where models with random weights are kept.

        Raises SettingsError when there is no model with early exits.
        """
        self.models = [model for model in models if model.has_exits]
        if not self.models:
            raise SettingsError("no model here has early exits; add them with `helios models add-exits`")
        self.sizes = sizes
        self.memory_bytes = memory_bytes
        self.precision = precision
        self.cache_dir = cache_dir
        self.say = say
        self.tokenizers = {
            model.name: load_tokenizer(model.path, model.facts).tokenizer for model in self.models
        }
        self._plans: dict[str, Plan] = {}
        self._windows: dict[tuple[str, str], list[list[int]]] = {}
        self._traces: dict[tuple[str, str], list[ExitTrace]] = {}

    def model(self, name: str) -> ModelEntry:
        """A model by name."""
        return next(model for model in self.models if model.name == name)

    def windows(self, model: ModelEntry, domain: str) -> list[list[int]]:
        """The held-out text in windows of equal length. Raises SettingsError when there is none."""
        key = (model.name, domain)
        if key not in self._windows:
            length = min(self.sizes.window_tokens, model.context_tokens)
            found = held_out.windows(self.tokenizers[model.name], domain, length, self.sizes.windows)
            if not found:
                raise SettingsError(f"no text of the domain {domain} has {length} tokens")
            self._windows[key] = found
        return self._windows[key]

    def prompts(self, model: ModelEntry, domains: Sequence[str], count: int) -> list[list[int]]:
        """Prompts of one length, from the domains' texts in turn. They repeat when the texts run out."""
        length = self.sizes.prompt_tokens
        pools = [[window[:length] for window in self.windows(model, domain)] for domain in domains]
        return [
            pools[index % len(pools)][index // len(pools) % len(pools[index % len(pools)])]
            for index in range(count)
        ]

    def plan(self, model: ModelEntry) -> Plan:
        """The model with all layers and every exit."""
        if model.name not in self._plans:
            self._plans[model.name] = load_plan(model.path, None, self.settings(ExitMode.DYNAMIC))
        return self._plans[model.name]

    def traces(self, model: ModelEntry, domain: str) -> list[ExitTrace]:
        """The predictions of every exit for the domain's windows."""
        key = (model.name, domain)
        if key not in self._traces:
            self.say(f"every exit of {model.name} on held-out {domain} text")
            self._traces[key] = trace_exits(self.plan(model), self.windows(model, domain))
        return self._traces[key]

    def judge(self, *domains: str) -> ModelEntry:
        """The best candidate on these domains: the one with the fewest nats per byte at full depth."""
        return min(self.models, key=lambda model: self._nats_per_byte(model, model.num_layers, domains))

    def quality(self, model: ModelEntry, depth: int, *domains: str) -> Quality:
        """The quality of a model at one depth, on these domains together."""
        traces = [trace for domain in domains for trace in self.traces(model, domain)]
        judge = self.judge(*domains)
        per_byte = self._nats_per_byte(model, depth, domains)
        excess = per_byte - self._nats_per_byte(judge, judge.num_layers, domains)
        mean = np.concatenate([trace.nats[trace.index(depth)] for trace in traces]).mean(dtype=np.float64)
        return Quality(
            perplexity=math.exp(mean),
            nats_per_byte=per_byte,
            perplexity_increase=math.expm1(excess * self._bytes_per_token(judge, domains)),
            agreement=float(np.concatenate([trace.agrees(depth) for trace in traces]).mean()),
        )

    def fastest_within(self, domain: str, bound: float) -> tuple[ModelEntry, int]:
        """The smallest plan whose perplexity is within `bound` (a share) of the best candidate's."""
        options = [(model, depth) for model in self.models for depth in model.exit_layers]
        within = [
            (model, depth)
            for model, depth in options
            if self.quality(model, depth, domain).perplexity_increase <= bound
        ]
        return min(within, key=lambda option: option[0].config.parameters(option[1]))

    def settings(self, exit_mode: ExitMode, max_running: int | None = None) -> EngineSettings:
        """Settings of an engine. Only the compared ones differ between engines."""
        running = max_running or self.sizes.largest_batch
        return EngineSettings(
            exit_mode=exit_mode,
            precision=self.precision,
            memory_bytes=self.memory_bytes,
            max_running=running,
            max_waiting=max(256, self.sizes.saturating_requests),
            # All prompts of a batch are prefilled in one step, so that decoding can be timed separately.
            step_token_budget=max(512, running * (self.sizes.prompt_tokens + 1)),
            prefill_stretch=math.inf,
            burst_seconds=SERVED_BURST_SECONDS,
            # Every round has the same prompts, so none may be served from cached KV.
            prefix_cache=False,
        )

    def engine(
        self, model: ModelEntry, depth: int | None = None, settings: EngineSettings | None = None
    ) -> Engine:
        """A new engine. Without settings its exit mode is greedy."""
        return Engine.load(model.path, depth, settings or self.settings(ExitMode.GREEDY))

    def text_nats(self, model: ModelEntry, texts: Sequence[Sequence[int]], prompt_tokens: int) -> float:
        """Mean nats per token of a model at full depth for the tokens after the prompts."""
        traces = trace_exits(self.plan(model), texts)
        return float(np.mean([trace.nats[-1, prompt_tokens - 1 :].mean() for trace in traces]))

    def _nats_per_byte(self, model: ModelEntry, depth: int, domains: Sequence[str]) -> float:
        traces = [trace for domain in domains for trace in self.traces(model, domain)]
        nats = math.fsum(float(trace.nats[trace.index(depth)].sum(dtype=np.float64)) for trace in traces)
        return nats / self._bytes(model, domains)

    def _bytes_per_token(self, model: ModelEntry, domains: Sequence[str]) -> float:
        windows = [window for domain in domains for window in self.windows(model, domain)]
        return self._bytes(model, domains) / sum(len(window) - 1 for window in windows)

    def _bytes(self, model: ModelEntry, domains: Sequence[str]) -> int:
        tokenizer = self.tokenizers[model.name]
        windows = [window for domain in domains for window in self.windows(model, domain)]
        return sum(len(tokenizer.decode(window[1:]).encode()) for window in windows)
