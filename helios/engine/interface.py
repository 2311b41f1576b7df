"""An engine as a worker sees it, and the values that pass between the two.

Free of torch and Numba, so that an engine that runs in another process can implement it without them.
"""

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from helios.errors import HeliosError
from helios.modes import ExitMode
from helios.sampling import SamplingParams
from helios.served import ServedPlan


class FinishReason(enum.Enum):
    """Why a sequence ended by itself."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"


# Not frozen: one is made for each token, and freezing makes that four times as slow.
@dataclass(slots=True)
class GeneratedToken:
    """One token as it leaves the engine.

    `index` counts generated tokens from 0; `logprob` is natural, before temperature and penalties;
    `confidence` is the top probability at the exit; `exit_layer` is the number of layers that computed it.
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
    """What one step did for one sequence: its new tokens, then its end or its failure if there was one."""

    tokens: tuple[GeneratedToken, ...] = ()
    finish: Finish | None = None
    error: HeliosError | None = None
    # Another sequence's output of the same step follows at once: whoever waits need not be woken yet.
    more: bool = False


Sink = Callable[[Output], None]
# Layers loaded so far, layers to load.
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class PhaseTimes:
    """When a sequence passed each phase, nanoseconds since the Unix epoch; 0: not yet."""

    submitted: int = field(default_factory=time.time_ns)
    scheduled: int = 0
    first_token: int = 0
    finished: int = 0


class Submitted(Protocol):
    """A sequence that was submitted, as far as whoever submitted it may look at it."""

    @property
    def plan(self) -> ServedPlan:
        """The plan that it is served under now: a reload may change it."""

    @property
    def times(self) -> PhaseTimes:
        """When it passed each phase."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, including those emitted before a resume."""

    @property
    def preemptions(self) -> int:
        """How often its keys and values were given up, to be computed again."""


@dataclass(slots=True)
class Counters:
    """What an engine has done since it started."""

    steps: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    finished_sequences: int = 0
    # Tokens whose confidence was below their exit's threshold (high-exit tokens, HT).
    high_exit_tokens: int = 0
    # Tokens generated under the plan that was in force, and the sum of -ln(confidence) over them.
    confidence_tokens: int = 0
    confidence_nats: float = 0.0
    # Prompts of which a sample of tokens was read out, the tokens of these samples, and the sum of their
    # negative natural log-probabilities.
    prompts_read: int = 0
    prompt_tokens_read: int = 0
    prompt_nats: float = 0.0


@dataclass(frozen=True, slots=True)
class Telemetry:
    """An engine's load at one moment. `step_age` is the age of its last step, seconds."""

    plan: ServedPlan
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    counters: Counters
    preemptions: int
    # Tokens that were not computed, because a sequence with the same beginning had been.
    cached_tokens: int
    step_age: float


@dataclass(frozen=True, slots=True)
class Served:
    """The plan that new sequences are served under, and facts about its model. Sizes are bytes."""

    plan: ServedPlan
    num_layers: int
    exit_layers: tuple[int, ...]
    vocab_size: int
    context_tokens: int
    # SHA-256 of tokenizer_json, in hexadecimal.
    tokenizer_id: str
    tokenizer_json: bytes
    # Confidence below which a token of this depth counts as unsure; None: the last layer has no threshold.
    threshold: float | None
    precision: str
    weight_bytes: int
    kv_bytes_per_token: int
    # What weights, keys and values may take together.
    memory_bytes: int
    # Read to load the plan; weights shared with the plan before it were not read again.
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine was started with. Sequences and tokens are counts."""

    exit_mode: ExitMode
    device: str
    max_running: int
    max_waiting: int
    step_token_budget: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did: bytes read, and sequences that go on under the new plan.

    stall_seconds: the longest time that one of them got no token, up to its first under the new plan.
    """

    bytes_read: int
    sequences_moved: int
    stall_seconds: float


class ServingEngine(Protocol):
    """Serves sequences, each under a plan, and reloads other plans beside serving.

    Any thread may call any of these. The engine calls sinks on its own thread; they must not block.
    """

    def start(self) -> None:
        """Begins to serve, in a thread of its own, until `stop`."""

    def stop(self) -> None:
        """Ends serving; sequences that are still there get UnavailableError."""

    @property
    def running(self) -> bool:
        """Whether it was started and still serves; False also after it has failed."""

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        sink: Sink,
        *,
        emitted_ids: list[int] | None = None,
        deadline: float | None = None,
    ) -> Submitted:
        """Queues a sequence. `sink` gets every Output.

        `emitted_ids` were generated earlier, perhaps elsewhere: the sequence goes on after them. `deadline`
        is on the clock of time.monotonic.
        Raises InvalidRequestError, OverloadedError, UnavailableError; another HeliosError if the emitted ids
        have no text.
        """

    def cancel(self, request_id: str, error: HeliosError | None = None) -> None:
        """Ends a sequence before the next step; its sink gets `error`. Unknown ids are ignored."""

    def reload(
        self,
        path: Path,
        depth: int | None = None,
        progress: Progress | None = None,
        threshold: float | None = None,
        *,
        urgent: bool = False,
    ) -> Reloaded:
        """Loads another plan, moves all sequences to it, and returns when all have moved.

        depth: None is all layers. threshold: the confidence of its exits, instead of what settings and
        calibration say. urgent: loading does not give way to serving. On an error the plan in force stays.
        Raises HeliosError.
        """

    def telemetry(self) -> Telemetry:
        """Its load now."""

    @property
    def served(self) -> Served:
        """What it serves now."""

    @property
    def limits(self) -> Limits:
        """What it was started with."""
