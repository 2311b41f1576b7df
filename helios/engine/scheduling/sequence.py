"""A sequence: one request inside the engine, from its submission to its last token."""

import enum
import itertools
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from helios.engine.scheduling.detokenizer import Detokenizer
from helios.errors import HeliosError
from helios.sampling import SamplingParams

_arrivals = itertools.count()


class FinishReason(enum.Enum):
    """Why a sequence ended by itself."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"


class SequenceState(enum.Enum):
    """Where a sequence is: in the queue, in the batch, or done (its blocks are free)."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


# Not frozen: one is made for each token, and that would take four times as long.
@dataclass(slots=True)
class GeneratedToken:
    """One token as it leaves the engine.

    `index` counts generated tokens from 0; `logprob` is natural, before temperature and penalties;
    `confidence` is the top probability at the exit; `exit_layer` the layers that computed it.
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
    """What one step did for one sequence: tokens, then its end or its failure if there was one."""

    tokens: tuple[GeneratedToken, ...] = ()
    finish: Finish | None = None
    error: HeliosError | None = None
    # Another sequence's output of the same step follows at once: whoever waits need not be woken yet.
    more: bool = False


@dataclass(slots=True)
class PhaseTimes:
    """When a sequence passed each phase, nanoseconds since the Unix epoch; 0: not yet."""

    submitted: int = field(default_factory=time.time_ns)
    scheduled: int = 0
    first_token: int = 0
    finished: int = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """State of one request. `token_ids` is the prompt and every token generated so far."""

    request_id: str
    token_ids: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    detokenizer: Detokenizer
    sink: Callable[[Output], None]
    # On the clock of time.monotonic.
    deadline: float | None = None
    arrival: int = field(default_factory=lambda: next(_arrivals))
    state: SequenceState = SequenceState.WAITING
    blocks: list[int] = field(default_factory=list)
    # Tokens whose KV is in the cache.
    computed: int = 0
    # Its KV is of the plan before the one in force: it goes on under that one until it is computed anew.
    outdated: bool = False
    preemptions: int = 0
    # Prompt tokens up to here have been sampled (`PromptReadings`); prefilled again, they are not read again.
    read_until: int = 0
    times: PhaseTimes = field(default_factory=PhaseTimes)
    # Whether each token is simply the likeliest one.
    takes_likeliest: bool = field(init=False)
    _digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.takes_likeliest = sampling.temperature == 0 and sampling.repetition_penalty == 1

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, those emitted before a resume included."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens that must still be computed before the next one can be sampled."""
        return len(self.token_ids) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether the one token that must still be computed is a generated one.

        A prompt's last token is no decode, however the prompt was cut into chunks: in exit mode dynamic all
        layers compute it.
        """
        return self.computed + 1 == len(self.token_ids) > self.prompt_tokens

    def digests(self, block_tokens: int) -> list[bytes]:
        """Of each full block of its tokens, a digest of all tokens up to the block's end."""
        while (end := (len(self._digests) + 1) * block_tokens) <= len(self.token_ids):
            before = self._digests[-1] if self._digests else b""
            tokens = array("q", self.token_ids[end - block_tokens : end]).tobytes()
            # Cryptographic: nobody can make a prompt that is taken for another one's beginning.
            self._digests.append(blake2b(before + tokens, digest_size=16).digest())
        return self._digests

    def finish(self, reason: FinishReason) -> Finish:
        """The closing event of this sequence."""
        return Finish(reason, self.detokenizer.text, self.prompt_tokens, self.completion_tokens)
