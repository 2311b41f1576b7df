"""The engine as a worker sees it, and the values that pass between the two.

This module needs neither torch nor Numba, so an engine in another process can implement it without them.
"""

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from helios.chat_template import ChatTemplate
from helios.errors import HeliosError
from helios.modes import ExitMode
from helios.routing.probe import Probe
from helios.sampling import SamplingParams
from helios.served import ServedPlan


class FinishReason(enum.Enum):
    """Why a sequence ended normally."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"


# Not frozen: one is created per token, and freezing makes creation four times as slow.
@dataclass(slots=True)
class GeneratedToken:
    """One generated token.

    `index` counts generated tokens from 0. `logprob` is the natural log-probability before temperature and
    penalties. `confidence` is the top probability at the exit. `exit_layer` is the number of layers that
    computed it.
    """

    index: int
    token_id: int
    text: str
    logprob: float
    confidence: float
    exit_layer: int
    model: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a sequence. `text` is the whole generated text, emitted tokens included."""

    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int


class Output(NamedTuple):
    """The result of one step for one sequence: its new tokens, then its end or error if there is one."""

    tokens: tuple[GeneratedToken, ...] = ()
    finish: Finish | None = None
    error: HeliosError | None = None
    # Whether another sequence's output of the same step follows at once, so that waiting threads need not be
    # woken yet.
    more: bool = False


Sink = Callable[[Output], None]
# (layers loaded so far, layers to load)
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class PhaseTimes:
    """When a sequence passed each phase, in nanoseconds since the Unix epoch. 0: not yet."""

    submitted: int = field(default_factory=time.time_ns)
    scheduled: int = 0
    first_token: int = 0
    finished: int = 0


class Route(Protocol):
    """Chooses the plan of one prompt from a probe. It runs on the engine's thread, so it must be quick."""

    def first(self, first_ids: Sequence[int]) -> str | None:
        """The model that is probed first. None, or a model that is not loaded: all models at once.

        first_ids: the tokens that are probed.
        """

    def __call__(self, probe: Probe, *, is_complete: bool) -> ServedPlan | None:
        """The plan, whether it is in force or not. None: it needs more readings, those of all loaded models
        first, and then those of all positions.

        is_complete: whether no more readings can be had. Then it must choose.
        """


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """How well its plan predicted a prompt that had been probed. It is known once the prompt is computed.

    `number` counts from 1. nats: sum of the negative natural log-probabilities of a sample of `tokens` prompt
    tokens after the probed ones, at the plan's exit.
    """

    number: int
    plan: ServedPlan
    probe: Probe
    tokens: int
    nats: float


@dataclass(frozen=True, slots=True)
class PlanToLoad:
    """A plan to serve. depth: None is all layers.

    threshold: overrides the confidence threshold of its exits from settings and calibration. share: the part
    of the served tokens that it is expected to hold, relative to the shares of the other plans. Where memory
    is scarce, the KV of its layers gets memory in this proportion.
    """

    path: Path
    depth: int | None = None
    threshold: float | None = None
    share: float = 1.0


class Submitted(Protocol):
    """A submitted sequence, as its submitter may see it."""

    @property
    def plan(self) -> ServedPlan:
        """The plan that it is served under now. A reload may change it."""

    @property
    def times(self) -> PhaseTimes:
        """When it passed each phase."""

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens."""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, including those emitted before a resume."""

    @property
    def preemptions(self) -> int:
        """How often its KV was dropped, to be recomputed later."""


@dataclass(slots=True)
class Counters:
    """Totals since the engine started."""

    steps: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    finished_sequences: int = 0
    # Tokens whose confidence was below their exit's threshold (high-exit tokens, HT). Counts only tokens
    # under plans in force.
    high_exit_tokens: int = 0
    # Tokens generated under plans in force, and the sum of -ln(confidence) over them.
    confidence_tokens: int = 0
    confidence_nats: float = 0.0
    # Prompts with a sample of tokens read out, the tokens of these samples, and the sum of their negative
    # natural log-probabilities.
    prompts_read: int = 0
    prompt_tokens_read: int = 0
    prompt_nats: float = 0.0


@dataclass(frozen=True, slots=True)
class Telemetry:
    """An engine's load at one moment. `step_age` is the seconds since its last step."""

    plan: ServedPlan
    # All plans in force, `plan` first, and the number of running sequences under each.
    plans: Mapping[ServedPlan, int]
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    counters: Counters
    preemptions: int
    # Tokens that were not computed because an earlier sequence had the same beginning.
    cached_tokens: int
    step_age: float


@dataclass(frozen=True, slots=True)
class Served:
    """The plans in force, and facts about the first one's model. Sizes are bytes.

    `plan` is the first one. New sequences get it unless they name another or are routed.
    """

    plan: ServedPlan
    plans: tuple[ServedPlan, ...]
    num_layers: int
    exit_layers: tuple[int, ...]
    vocab_size: int
    context_tokens: int
    # SHA-256 of tokenizer_json, in hexadecimal.
    tokenizer_id: str
    tokenizer_json: bytes
    # By model of the plans. Models without one are missing.
    chat_templates: Mapping[str, ChatTemplate]
    # A token of this depth counts as unsure below this confidence. None: the last layer has no threshold.
    threshold: float | None
    precision: str
    weight_bytes: int
    kv_bytes_per_token: int
    # Budget for weights, keys and values together.
    memory_bytes: int
    # Bytes read to load the plan. Weights shared with the previous plan were not read again.
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that an engine was started with. Sequences and tokens are counts."""

    exit_mode: ExitMode
    device: str
    max_running: int
    max_waiting: int
    step_token_budget: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The result of a reload: bytes read, and sequences that continue under the new plan.

    stall_seconds: the longest time that any of them got no token, until its first token under the new plan.
    """

    bytes_read: int
    sequences_moved: int
    stall_seconds: float


class ServingEngine(Protocol):
    """Serves sequences, each under a plan, and reloads other plans while serving.

    Any thread may call any method. The engine calls sinks on its own thread, so they must not block.
    """

    def start(self) -> None:
        """Begins to serve in its own thread, until `stop`."""

    def stop(self) -> None:
        """Ends serving. Sequences that have not ended get UnavailableError."""

    @property
    def running(self) -> bool:
        """Whether it was started and still serves. False also after it has failed."""

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        sink: Sink,
        *,
        emitted_ids: list[int] | None = None,
        deadline: float | None = None,
        plan: ServedPlan | None = None,
        route: Route | None = None,
    ) -> Submitted:
        """Queues a sequence. `sink` gets every Output.

        `emitted_ids` were generated earlier, perhaps by another engine; the sequence continues after them.
        `deadline` is on the clock of time.monotonic.
        plan: one of the plans in force; None: the first one. route: chooses the plan after a probe of the
        prompt; it replaces `plan`. If it chooses a plan that is not in force, or raises, the sequence ends
        with PlanNotServedError or that error; with SequenceFailedError if it chooses none.
        Raises InvalidRequestError, OverloadedError, UnavailableError, PlanNotServedError; another HeliosError
        if the emitted ids cannot be turned into text.
        """

    def cancel(self, request_id: str, error: HeliosError | None = None) -> None:
        """Ends a sequence before the next step. Its sink gets `error`. Unknown ids are ignored."""

    def reload(
        self,
        path: Path,
        depth: int | None = None,
        progress: Progress | None = None,
        threshold: float | None = None,
        *,
        also: Sequence[PlanToLoad] = (),
        urgent: bool = False,
    ) -> Reloaded:
        """Puts other plans in force: one, and those in `also`. Returns when no sequence needs an old plan.

        Sequences whose plan stays in force keep it and their KV. All others move to a new plan: to the
        shallowest of their model that is at least as deep, else to the deepest of their model, else to the
        first plan.
        depth: None is all layers. threshold: overrides the confidence of its exits from settings and
        calibration. urgent: loading does not yield to serving. On an error the current plans stay in force.
        Raises HeliosError.
        """

    def telemetry(self) -> Telemetry:
        """The current load."""

    def served_prompts(self, after: int) -> list[ServedPrompt]:
        """Probed prompts with a number above `after`, ascending. Only the newest ones are kept."""

    @property
    def served(self) -> Served:
        """The plans in force."""

    @property
    def limits(self) -> Limits:
        """The limits that it was started with."""
