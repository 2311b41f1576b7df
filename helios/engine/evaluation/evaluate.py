"""Evaluates a candidate on given prompts (arXiv 2504.10724): quality, speed and size of each exit."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from helios.calibration import calibrated_threshold
from helios.engine.backends.kv_cache import KVCache, kv_bytes
from helios.engine.evaluation.candidate import Candidate, check_finite
from helios.engine.evaluation.pace import Pace
from helios.engine.evaluation.prompt import fit_prompt
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.evaluation.space import GROUP, Space
from helios.engine.evaluation.tally import ExitTally, tally_continuations, tally_prompt
from helios.engine.evaluation.timing import Timing, facts_of, has_same_steps, time_steps
from helios.errors import InvalidRequestError
from helios.history import CONFIDENCE_BINS, DecodeSpeed, ExitProfile, ModelProfile, RequestSample

Progress = Callable[[int, int], None]  # (requests done, all requests)


def evaluate(
    candidate: Candidate,
    prompts: Seq[Seq[int]],
    settings: EvaluationSettings,
    progress: Progress | None = None,
    pace: Pace | None = None,
    timed: ModelProfile | None = None,
    names: Seq[str] | None = None,
) -> ModelProfile:
    """Runs the prompts (token ids) at full depth, reads every exit, then times the model's steps.

    Histograms count every position of the prompts and of their greedy continuations by the last layer,
    because served text is generated text. Perplexity covers only the prompts. Works in the caller's thread.

    timed: an earlier profile of the model. Its speeds are reused if they come from equal hardware, threads,
    precision and checkpoint: unlike quality they do not depend on the traffic, and measuring them is most of
    the work. names: one per prompt, the same for every candidate; default: derived from the ids.

    Raises InvalidRequestError for prompts that cannot be run, CheckpointError for weights whose probabilities
    are not finite, CancelledError once `pace` is stopped.
    """
    pace = pace or Pace()
    began, began_cpu = time.perf_counter(), time.process_time()
    entry, model, tokenizer = candidate.entry, candidate.model, candidate.tokenizer
    ids = [fit_prompt(prompt, entry, settings) for prompt in prompts]
    predicted = sum(len(one) - 1 for one in ids)
    text_bytes = [len(tokenizer.decode(one[1:]).encode()) for one in ids]
    if not sum(text_bytes):
        raise InvalidRequestError("the prompts hold no text after their first tokens")
    facts = facts_of(candidate, settings)
    if timed is not None and not has_same_steps(timed, entry, settings, facts):
        timed = None
    space = Space.plan(entry, ids, settings, timing=timed is None)
    cache = space.cache(model)

    tallies = {layer: ExitTally() for layer in entry.exit_layers}
    nats = _tally(candidate, cache, space, ids, settings, tallies, progress, pace)
    check_finite(candidate, (tally.nats for tally in tallies.values()), settings)
    began_timing = time.process_time()
    timing = Timing.of(timed) if timed is not None else time_steps(candidate, cache, space, settings, pace)
    once_cpu_seconds = time.process_time() - began_timing

    median_prompt = statistics.median_low(map(len, ids))
    block_bytes = kv_bytes(cache.num_heads, cache.head_dim, cache.block_tokens, cache.dtype)

    def profile(depth: int) -> ExitProfile:
        tally, speed = tallies[depth], timing.speeds[depth]
        return ExitProfile(
            depth=depth,
            threshold=_threshold(tally, settings) if depth < model.depth else 0.0,
            confidence_counts=tuple(tally.counts.tolist()),
            agreement_counts=tuple(tally.agreements.tolist()),
            perplexity=math.exp(tally.nats / predicted),
            nats_per_byte=tally.nats / sum(text_bytes),
            decode=tuple(
                DecodeSpeed(batch=batch, step_seconds=seconds) for batch, seconds in speed.decode.items()
            ),
            prefill_tokens_per_second=1 / speed.prefill_per_token,
            ttft_seconds=speed.first_token(median_prompt),
            weight_bytes=candidate.weight_bytes[depth],
            kv_bytes_per_token=depth * block_bytes // cache.block_tokens,
            load_seconds=timing.load_seconds[depth],
            joules_per_token=timing.joules[depth],
        )

    if names is None:
        names = [str(hash(tuple(one))) for one in ids]
    return ModelProfile(
        model=entry.name,
        time=time.time(),
        requests=len(ids),
        tokens=int(tallies[model.depth].counts.sum()),
        exits=tuple(profile(depth) for depth in entry.exit_layers),
        wall_seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - began_cpu,
        once_cpu_seconds=once_cpu_seconds,
        tokenizer_id=candidate.tokenizer_id,
        bytes_per_token=sum(text_bytes) / predicted,
        samples=tuple(
            RequestSample(id=name, text_bytes=size, nats=found)
            for name, size, found in zip(names, text_bytes, nats, strict=True)
        ),
        provenance={
            **facts,
            **timing.provenance,
            "thresholds": (
                f"agreement {settings.target_agreement:g}" if settings.threshold is None else "fixed"
            ),
        },
    )


def _tally(
    candidate: Candidate,
    cache: KVCache,
    space: Space,
    ids: Seq[Seq[int]],
    settings: EvaluationSettings,
    tallies: Mapping[int, ExitTally],
    progress: Progress | None,
    pace: Pace,
) -> list[tuple[float, ...]]:
    """Counts prompts and continuations in `tallies`, by exit layer. Returns each prompt's nats by exit."""
    model, block_tokens = candidate.model, settings.block_tokens
    found = []
    for first in range(0, len(ids), GROUP):
        group = space.sequences(candidate.tokenizer, ids[first : first + GROUP], settings.generated_tokens)
        for done, sequence in enumerate(group, first):
            if progress is not None:
                progress(done, len(ids))
            before = [tally.nats for tally in tallies.values()]
            tally_prompt(model, cache, sequence, block_tokens, tallies, pace)
            pairs = zip(tallies.values(), before, strict=True)
            found.append(tuple(tally.nats - so_far for tally, so_far in pairs))
        tally_continuations(model, cache, group, settings.generated_tokens - 1, block_tokens, tallies, pace)
    if progress is not None:
        progress(len(ids), len(ids))
    return found


def _threshold(tally: ExitTally, settings: EvaluationSettings) -> float:
    """The configured threshold of an exit, or else the one calibrated on its histogram."""
    if settings.threshold is not None:
        return settings.threshold
    edges = [index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS)]
    return calibrated_threshold(
        edges, tally.counts.tolist(), tally.agreements.tolist(), settings.target_agreement
    )
