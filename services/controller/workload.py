"""The lengths of a mean request."""

from dataclasses import dataclass

from services.controller.fleet import Totals

# Fewest finished requests before measured mean lengths replace those that were assumed.
_ENOUGH_REQUESTS = 10


@dataclass(slots=True)
class Workload:
    """Tokens of a mean request: prompt, and generated."""

    prompt_tokens: float
    output_tokens: float

    def learn(self, done: Totals) -> None:
        """Takes over the mean lengths of what was done, if that is enough to tell."""
        if done.finished >= _ENOUGH_REQUESTS and done.prefilled and done.generated:
            self.prompt_tokens = done.prefilled / done.finished
            self.output_tokens = done.generated / done.finished
