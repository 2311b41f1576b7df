"""Performance history written by hand, for tests of the code that reads it."""

from collections.abc import Sequence

from helios.history import CONFIDENCE_BINS, DecodeSpeed, ExitProfile, ModelProfile

THRESHOLD = 0.5


def exit_profile(
    depth: int,
    nats_per_byte: float,
    *,
    step_seconds: float | None = None,
    sure: float = 0.8,
    agreement: float = 0.9,
    load_seconds: float = 0.1,
    joules_per_token: float | None = None,
) -> ExitProfile:
    """An exit where the share `sure` of 1,000 tokens is above the threshold. A step takes 1 ms per layer."""
    counts = [0] * CONFIDENCE_BINS
    counts[0], counts[-1] = 1000 - round(1000 * sure), round(1000 * sure)
    agreeing = [0] * CONFIDENCE_BINS
    agreeing[-1] = round(1000 * agreement)
    seconds = depth * 0.001 if step_seconds is None else step_seconds
    return ExitProfile(
        depth=depth,
        threshold=THRESHOLD,
        confidence_counts=tuple(counts),
        agreement_counts=tuple(agreeing),
        nats_per_byte=nats_per_byte,
        perplexity=20,
        decode=(
            DecodeSpeed(batch=1, step_seconds=seconds),
            DecodeSpeed(batch=16, step_seconds=2 * seconds),
        ),
        prefill_tokens_per_second=2 / seconds,
        ttft_seconds=0.01 * depth,
        weight_bytes=1_000_000 * depth,
        kv_bytes_per_token=512 * depth,
        load_seconds=load_seconds,
        joules_per_token=joules_per_token,
    )


def model_profile(
    model: str, exits: Sequence[ExitProfile], *, time: float = 1000.0, tokenizer_id: str = "t"
) -> ModelProfile:
    """A profile of these exits, with 4 bytes of text per token."""
    return ModelProfile(
        model=model,
        time=time,
        requests=5,
        tokens=1000,
        exits=tuple(exits),
        wall_seconds=0.2,
        cpu_seconds=0.2,
        tokenizer_id=tokenizer_id,
        bytes_per_token=4.0,
        provenance={"host": "test"},
    )
