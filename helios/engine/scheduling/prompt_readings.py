"""A sample of each prompt's own tokens, read out while it is prefilled: how well the plan reads the traffic.

Prefill computes all that these tokens' probabilities need but the LM head's rows. So a few more rows tell
what the served exit makes of real prompts, without any evaluation.
"""

import math

from helios.engine.backends.readout import Readout
from helios.engine.scheduling.sequence import Sequence

# Of a prompt's tokens at most one in so many is read: a short prompt costs little more than it did.
_SPACING = 16


def read_positions(prompt_tokens: int, most: int) -> list[int]:
    """Which tokens of a prompt are read, at most `most`: evenly spread over all that have a next one."""
    predicted, count = prompt_tokens - 1, min(most, prompt_tokens // _SPACING)
    return [(2 * index + 1) * predicted // (2 * count) for index in range(count)]


class PromptReadings:
    """The rows of one step that are read for this, and the tokens that follow them."""

    def __init__(self, most: int) -> None:
        """most: rows of one prompt."""
        self._most = most
        # Rows of the batch, and the prompt's next token at each.
        self.rows: list[int] = []
        self._targets: list[int] = []
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
        self._targets += (seq.token_ids[position + 1] for position in chosen)
        self.prompts += not seq.read_until
        seq.read_until = stop

    def nats(self, found: Readout) -> float:
        """Sum of the negative log-probabilities of what follows. found: of these rows alone.

        Infinite or NaN where the model computes no probabilities.
        """
        logits = found.logits
        chosen = (float(logits[row, target]) for row, target in enumerate(self._targets))
        return math.fsum(
            normalizer - logit for normalizer, logit in zip(found.normalizers.tolist(), chosen, strict=True)
        )
