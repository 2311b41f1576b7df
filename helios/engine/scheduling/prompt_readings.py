"""A sample of each prompt's own tokens, read out while it is prefilled: how well the plan reads the traffic.

Prefill computes all that these tokens' probabilities need, except the LM head's rows. So a few more rows
show how well the served exit predicts real prompts, without any evaluation.
"""

from helios.engine.scheduling.sequence import Sequence

# At most one in so many of a prompt's tokens is read: a short prompt costs little more than without.
_SPACING = 16


def read_positions(prompt_tokens: int, most: int) -> list[int]:
    """Which tokens of a prompt are read, at most `most`: spread evenly over all that have a next token."""
    predicted, count = prompt_tokens - 1, min(most, prompt_tokens // _SPACING)
    return [(2 * index + 1) * predicted // (2 * count) for index in range(count)]


class PromptReadings:
    """The rows of one step that are read for this sample, and the tokens that follow them."""

    def __init__(self, most: int) -> None:
        """most: rows of one prompt."""
        self._most = most
        # Rows of the batch, and the prompt's next token at each.
        self.rows: list[int] = []
        self.targets: list[int] = []
        # Prompts of which no token had been read before.
        self.prompts = 0

    def take(self, seq: Sequence, start: int, end: int, first_row: int) -> None:
        """Chooses among the tokens start..end of a sequence, whose rows begin at `first_row`."""
        begin, stop = max(start, seq.read_until), min(end, seq.prompt_tokens - 1)
        # The same tokens, however the prompt is cut into chunks.
        chosen = [at for at in read_positions(seq.prompt_tokens, self._most) if begin <= at < stop]
        if not chosen:
            return
        self.rows += (first_row + position - start for position in chosen)
        self.targets += (seq.token_ids[position + 1] for position in chosen)
        self.prompts += not seq.read_until
        seq.read_until = stop
