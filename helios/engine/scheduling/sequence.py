"""A sequence: one request inside the engine, from submission to its last token."""

import enum
import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from helios.engine.interface import Finish, FinishReason, Output, PhaseTimes, Route
from helios.engine.scheduling.detokenizer import Detokenizer
from helios.engine.scheduling.probed_layers import ProbedLayers
from helios.routing.probe import Probe
from helios.sampling import SamplingParams
from helios.served import ServedPlan

_arrivals = itertools.count()


class SequenceState(enum.Enum):
    """Where a sequence is: in the queue, in the batch, or done (its blocks are free)."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """State of one request. `token_ids` holds the prompt and every token generated so far."""

    request_id: str
    token_ids: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    detokenizer: Detokenizer
    sink: Callable[[Output], None]
    # The plan under which it is computed. Its KV is valid for this plan's layers.
    plan: ServedPlan
    # Deadline on the clock of time.monotonic.
    deadline: float | None = None
    arrival: int = field(default_factory=lambda: next(_arrivals))
    state: SequenceState = SequenceState.WAITING
    blocks: list[int] = field(default_factory=list)
    # Number of tokens whose KV is in the blocks.
    computed: int = 0
    # The plan that it gets when it is preempted next. None: it keeps its plan.
    next_plan: ServedPlan | None = None
    preemptions: int = 0
    # Prompt tokens before this one have been sampled (`PromptReadings`). A second prefill does not read them
    # again.
    read_until: int = 0
    # Number of prompt tokens read under its plan that the probe had not seen, and the sum of their negative
    # natural log-probabilities.
    read_tokens: int = 0
    read_nats: float = 0.0
    # Chooses its plan once its prompt is probed. None: it has its plan.
    route: Route | None = None
    # What a probe found, and the number of prompt tokens that the probe saw. None: it was not probed.
    probe: Probe | None = None
    probed_tokens: int = 0
    # The layers that the probe computed, until prefill goes on with them.
    probed: ProbedLayers | None = None
    times: PhaseTimes = field(default_factory=PhaseTimes)
    # Whether every token is simply the most likely one.
    takes_likeliest: bool = field(init=False)
    _digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.takes_likeliest = sampling.temperature == 0 and sampling.repetition_penalty == 1

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, including those emitted before a resume."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens that must still be computed before the next one can be sampled."""
        return len(self.token_ids) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether exactly one token must be computed and it is a generated one.

        A prompt's last token is never a decode, however the prompt was cut into chunks: in exit mode dynamic
        all layers compute it.
        """
        return self.computed + 1 == len(self.token_ids) > self.prompt_tokens

    def change_plan(self, plan: ServedPlan) -> None:
        """Continues under another plan. What has been computed must be valid for it."""
        if plan.model != self.plan.model:
            self._digests.clear()
        if plan != self.plan:
            self.read_tokens, self.read_nats = 0, 0.0
        self.plan = plan

    def digests(self, block_tokens: int) -> list[bytes]:
        """For each full block, a digest of the model's name and all tokens up to the end of the block."""
        while (end := (len(self._digests) + 1) * block_tokens) <= len(self.token_ids):
            before = self._digests[-1] if self._digests else self.plan.model.encode()
            tokens = array("q", self.token_ids[end - block_tokens : end]).tobytes()
            # A cryptographic hash, so that nobody can craft a prompt that passes for another prompt's prefix.
            self._digests.append(blake2b(before + tokens, digest_size=16).digest())
        return self._digests

    def finish(self, reason: FinishReason) -> Finish:
        """The final event of this sequence."""
        return Finish(reason, self.detokenizer.text, self.prompt_tokens, self.completion_tokens)
