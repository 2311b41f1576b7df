"""A worker's rates between two of its telemetry messages."""

from dataclasses import dataclass

from helios.v1 import worker_pb2

# Tokens in the window of the confidence breach counter (CBC), unless the controller's settings differ.
WINDOW_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second, seconds per token of a stream, and the share of unsure tokens.

    None: nothing was generated.
    """

    tokens: int = 0
    tokens_per_second: float = 0.0
    tpot_seconds: float | None = None
    high_exit_share: float | None = None

    @property
    def cbc(self) -> float | None:
        """Unsure tokens, scaled to a window of the default length. None: nothing was generated."""
        return None if self.high_exit_share is None else self.high_exit_share * WINDOW_TOKENS


def rates(now: worker_pb2.Telemetry, before: worker_pb2.Telemetry | None) -> Rates:
    """The rates between two messages of one worker. Messages of different processes have no rates."""
    if before is None or now.time <= before.time or now.generated_tokens <= before.generated_tokens:
        return Rates()
    tokens, seconds = now.generated_tokens - before.generated_tokens, now.time - before.time
    running = max(1, (now.running + before.running) / 2)
    unsure = now.high_exit_tokens - before.high_exit_tokens
    return Rates(tokens, tokens / seconds, running * seconds / tokens, unsure / tokens)
