"""Reads out a sample of each prompt's tokens in prefill, to see how well the plan predicts the traffic.

Prefill computes everything that these tokens' probabilities need, except for their rows of the LM head. So a
few more rows show how well the served exit predicts real prompts, without any evaluation.
"""

from dataclasses import dataclass

from helios.engine.scheduling.sequence import Sequence
from helios.routing.probe import evenly_spread

# At most one in this many prompt tokens is read, so that a short prompt costs little more.
_SPACING = 16


def read_positions(prompt_tokens: int, most: int) -> list[int]:
    """Positions of a prompt that are read, at most `most`, evenly spread over all that have a next token."""
    return evenly_spread(min(most, prompt_tokens // _SPACING), prompt_tokens - 1)


@dataclass(frozen=True, slots=True)
class PromptReading:
    """One prompt's part of a step's readings: those numbered start..end."""

    sequence: Sequence
    start: int
    # From this one on, readings are of tokens that the prompt's probe had not seen.
    unprobed: int
    end: int
    # Whether no token of the prompt had been read before.
    is_first: bool


class PromptReadings:
    """The rows of one step that are read for this sample, and the tokens that follow them."""

    def __init__(self, most: int) -> None:
        """most: maximum number of rows per prompt."""
        self._most = most
        # Rows of the batch, and for each the prompt's next token.
        self.rows: list[int] = []
        self.targets: list[int] = []
        self.prompts: list[PromptReading] = []

    def take(self, seq: Sequence, start: int, end: int, first_row: int) -> None:
        """Chooses among the tokens start..end of a sequence. Their rows begin at `first_row`."""
        begin, stop = max(start, seq.read_until), min(end, seq.prompt_tokens - 1)
        # The choice does not depend on how the prompt is cut into chunks.
        chosen = [at for at in read_positions(seq.prompt_tokens, self._most) if begin <= at < stop]
        if not chosen:
            return
        first = len(self.rows)
        self.rows += (first_row + position - start for position in chosen)
        self.targets += (seq.token_ids[position + 1] for position in chosen)
        probed = sum(position + 1 < seq.probed_tokens for position in chosen)
        is_first = not seq.read_until
        self.prompts.append(PromptReading(seq, first, first + probed, len(self.rows), is_first))
        seq.read_until = stop
