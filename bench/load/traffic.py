"""Traffic that changes: phases of prompts of one kind or of several, from held-out texts."""

import itertools
import math
import random
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from bench.load.clients import Request
from bench.texts import held_out
from helios.errors import SettingsError

# Upper limits: a model with a short context gets fewer.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 96, 48
# The documents of a domain are dealt out to so many parts.
_PARTS = 6


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of traffic. Its prompts are cut from texts of these domains in turn.

    parts: the parts of each domain's documents that are used. A router learns from what was served, so phases
    share no document.
    """

    name: str
    domains: tuple[str, ...]
    parts: tuple[int, ...]


class Traffic:
    """The prompts of each phase, in the same order for every system."""

    def __init__(
        self, context_tokens: int, tokenizer: Tokenizer, prompt_tokens: int = _PROMPT_TOKENS
    ) -> None:
        """context_tokens: the shortest context of the models that may serve."""
        self.prompt_tokens = min(prompt_tokens, context_tokens // 2)
        self.output_tokens = min(_OUTPUT_TOKENS, context_tokens // 4)
        self._documents = {
            domain: [tokenizer.encode(document).ids for document in held_out.documents(domain)]
            for domain in held_out.DOMAINS
        }

    def prompts(self, phase: Phase, count: int) -> list[tuple[int, ...]]:
        """The first prompts of a phase."""
        return [one.prompt_ids for one in itertools.islice(self.requests(phase), count)]

    def requests(self, phase: Phase, seconds: float = math.inf) -> Iterator[Request]:
        """Yields requests of a phase until `seconds` have passed."""
        until = time.monotonic() + seconds
        pools = itertools.cycle([self._prompts(domain, phase.parts) for domain in phase.domains])
        while time.monotonic() < until:
            yield Request(next(next(pools)), self.output_tokens)

    def _prompts(self, domain: str, parts: Collection[int]) -> Iterator[tuple[int, ...]]:
        """Yields prompts without end. The texts are cut at other places in each round, because the KV of a
        repeated prompt could still be cached. Raises SettingsError if no text is long enough."""
        # Each prompt begins with the text's start token.
        length = self.prompt_tokens - 1
        documents = [ids for at, ids in enumerate(self._documents[domain]) if at % _PARTS in parts]
        for round_ in itertools.count():
            offset = 1 + round_ * 13 % length
            cuts = [
                (ids[0], *ids[start : start + length])
                for ids in documents
                for start in range(offset, len(ids) - length + 1, length)
            ]
            if not cuts:
                raise SettingsError(f"no held-out {domain} text has {length + offset} tokens")
            random.Random(round_).shuffle(cuts)
            yield from cuts
