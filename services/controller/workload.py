"""The token counts of a mean request."""

from dataclasses import dataclass

from services.controller.fleet import Totals

# Fewest finished requests before measured means replace the assumed ones.
_ENOUGH_REQUESTS = 10


@dataclass(slots=True)
class Workload:
    """Tokens of a mean request: prompt tokens and generated tokens."""

    prompt_tokens: float
    output_tokens: float

    def learn(self, done: Totals) -> None:
        """Replaces the means by measured ones, if there are enough requests."""
        if done.finished >= _ENOUGH_REQUESTS and done.prefilled and done.generated:
            self.prompt_tokens = done.prefilled / done.finished
            self.output_tokens = done.generated / done.finished
