"""Delivers the tokens of a step: ids to text, stop reasons, counters, and calls of sinks."""

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from helios.engine.backends.readout import Readout
from helios.engine.backends.sampler import Sampled
from helios.engine.interface import Counters, FinishReason, GeneratedToken, Output, ServedPrompt
from helios.engine.plan import Plan
from helios.engine.scheduling.prompt_readings import PromptReadings
from helios.engine.scheduling.scheduler import Scheduler
from helios.engine.scheduling.sequence import Sequence
from helios.errors import HeliosError, SequenceFailedError

log = logging.getLogger(__name__)

# Whoever wants all served prompts must ask for them before this many more have been computed.
_KEPT_PROMPTS = 4096


class Delivery:
    """Gives tokens to the sinks of their sequences, ends sequences, and counts both.

    An error of one sequence, or of its sink, ends only this sequence. All others continue.
    """

    def __init__(self, scheduler: Scheduler, forget: Callable[[Sequence], None]) -> None:
        """forget: called with each ended sequence, before its sink is told."""
        self.counters = Counters()
        # The newest probed prompts that are computed, and the number of all of them.
        self.served_prompts: deque[ServedPrompt] = deque(maxlen=_KEPT_PROMPTS)
        self._prompts = 0
        self._scheduler, self._forget = scheduler, forget

    def deliver(
        self, plan: Plan, readers: Seq[Sequence], sampled: Sampled, exits: Seq[int], *, in_force: bool
    ) -> None:
        """Delivers the tokens of `readers`, sampled under plans of one model, of which `plan` is one.

        sampled, exits: the tokens of all readers in one step, then those of the next step of the same burst.
        in_force: whether new sequences get these plans. Only then do tokens count towards their confidence.
        """
        outputs = self._outputs(plan, readers, sampled, exits, in_force=in_force)
        # Sinks are called together after the last output is ready. Detokenizing releases the GIL, so threads
        # that a sink has woken would run in between.
        for seq, output in zip(readers, outputs, strict=True):
            if output.finish is not None or output.error is not None:
                self.end(seq, output)
                continue
            try:
                seq.sink(output)
            except Exception as error:
                self.end(seq, Output(error=failure(seq, error)))

    def end(self, seq: Sequence, output: Output) -> None:
        """Ends a sequence with its last output."""
        self._scheduler.finish(seq)
        seq.times.finished = time.time_ns()
        self._forget(seq)
        self.counters.finished_sequences += 1
        self._tell(seq, output)

    def note_readings(self, readings: PromptReadings, found: Readout) -> None:
        """Counts a sample of prompt tokens. found: the readout of only these rows."""
        for one in readings.prompts:
            seq, targets = one.sequence, readings.targets
            probed, unprobed = (
                found.rows(slice(start, end)).nats(targets[start:end])
                for start, end in ((one.start, one.unprobed), (one.unprobed, one.end))
            )
            if math.isfinite(probed + unprobed):
                self.counters.prompts_read += one.is_first
                self.counters.prompt_tokens_read += one.end - one.start
                self.counters.prompt_nats += probed + unprobed
                seq.read_tokens += one.end - one.unprobed
                seq.read_nats += unprobed

    def _outputs(
        self, plan: Plan, readers: Seq[Sequence], sampled: Sampled, exits: Seq[int], *, in_force: bool
    ) -> list[Output]:
        now, names, count = time.time_ns(), itertools.repeat(plan.entry.name), len(readers)
        eos_token_ids, threshold_of = plan.model.config.eos_token_ids, plan.thresholds.get
        outputs, generated, high_exits, doubts = list[Output](), 0, 0, 0.0
        for index, seq in enumerate(readers):
            ids, layers, first = sampled.token_ids[index::count], exits[index::count], seq.completion_tokens
            logprobs, confidences = (part[index::count] for part in (sampled.logprobs, sampled.confidences))
            try:
                # The sum is NaN if any term is.
                if not math.isfinite(sum(confidences, sum(logprobs))):
                    raise plan.not_finite(layers, confidences)
                texts, reason = take(seq, ids, first, eos_token_ids)
            except Exception as error:
                outputs.append(Output(error=failure(seq, error), more=index + 1 < count))
                continue
            made = len(texts)
            seq.token_ids += ids[:made]
            finish = None if reason is None else seq.finish(reason)
            numbers = range(first, first + made)
            # map stops at the shortest: `texts` may be shorter than `ids`.
            tokens = tuple(map(GeneratedToken, numbers, ids, texts, logprobs, confidences, layers, names))
            found = zip(confidences[:made], layers, strict=False)
            doubts += sum(map(math.log, confidences[:made]))
            high_exits += sum(confidence < threshold_of(layer, 0.0) for confidence, layer in found)
            if not seq.times.first_token:
                seq.times.first_token = now
                self._note_prompt(seq)
            if made > 1:
                # Each later step of a burst also wrote the keys and values of the token before it.
                self._scheduler.advance(seq, made - 1)
            generated += made
            outputs.append(Output(tokens, finish, more=index + 1 < count))
        self.counters.generated_tokens += generated
        if in_force:
            self.counters.high_exit_tokens += high_exits
            self.counters.confidence_tokens += generated
            self.counters.confidence_nats -= doubts
        return outputs

    def _note_prompt(self, seq: Sequence) -> None:
        """Keeps how well its plan predicted the prompt of a sequence, which is now computed."""
        if seq.probe is not None and seq.read_tokens:
            self._prompts += 1
            self.served_prompts.append(
                ServedPrompt(self._prompts, seq.plan, seq.probe, seq.read_tokens, seq.read_nats)
            )

    def _tell(self, seq: Sequence, output: Output) -> None:
        """Gives a sequence's last output to its sink. If that fails, gives it an error instead."""
        try:
            seq.sink(output)
        except Exception as error:
            found = failure(seq, error)
            if output.error is None:
                self._tell(seq, Output(error=found))


def take(
    seq: Sequence, ids: list[int], before: int, eos_token_ids: Seq[int]
) -> tuple[list[str], FinishReason | None]:
    """The texts of a sequence's next tokens, up to the one that ends it, and the stop reason if any.

    before: number of tokens generated earlier. The text of the last token includes all text that was held
    back. The end-of-text token has an empty text, whatever the tokenizer says.
    """
    reason, left = None, seq.sampling.max_tokens - before
    if len(ids) >= left:
        ids, reason = ids[:left], FinishReason.LENGTH
    if not seq.sampling.ignore_eos:
        for eos in eos_token_ids:
            if eos in ids:
                ids, reason = ids[: ids.index(eos) + 1], FinishReason.EOS
    detokenizer = seq.detokenizer
    texts = detokenizer.push_all(ids if reason is not FinishReason.EOS else ids[:-1])
    if detokenizer.stopped:
        return texts, FinishReason.STOP
    if reason is FinishReason.EOS:
        texts.append("")
    if reason is not None:
        texts[-1] += detokenizer.flush()
    return texts, reason


def failure(seq: Sequence, error: Exception) -> HeliosError:
    """The error for a sequence that failed by itself. The cause goes to the log."""
    log.error("sequence %s failed", seq.request_id, exc_info=error)
    if isinstance(error, HeliosError):
        return error
    return SequenceFailedError(
        f"the sequence failed: {type(error).__name__}: {error}; the worker's log has the cause"
    )
