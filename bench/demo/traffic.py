"""The traffic of the demo: phases of prompts of one kind or of several."""

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from bench.load.clients import Request
from bench.texts import held_out
from helios.catalog import ModelEntry

# Streams that are open at once.
STREAMS = 32
# Upper limits: a model with a short context gets fewer.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 96, 48


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of traffic. Its prompts are cut from texts of these domains in turn."""

    name: str
    domains: tuple[str, ...]


PHASES = (*(Phase(domain, (domain,)) for domain in held_out.DOMAINS), Phase("mix", tuple(held_out.DOMAINS)))


class Traffic:
    """The prompts of each phase, in the same order for every system."""

    def __init__(self, model: ModelEntry, tokenizer: Tokenizer) -> None:
        self.prompt_tokens = min(_PROMPT_TOKENS, model.context_tokens // 2)
        self.output_tokens = min(_OUTPUT_TOKENS, model.context_tokens // 4)
        self._documents = {
            domain: [tokenizer.encode(document).ids for document in held_out.documents(domain)]
            for domain in held_out.DOMAINS
        }

    def requests(self, phase: Phase, seconds: float) -> Iterator[Request]:
        """Yields requests of a phase until `seconds` have passed."""
        until = time.monotonic() + seconds
        pools = itertools.cycle([self._prompts(domain, PHASES.index(phase)) for domain in phase.domains])
        while time.monotonic() < until:
            yield Request(next(next(pools)), self.output_tokens)

    def _prompts(self, domain: str, first: int) -> Iterator[tuple[int, ...]]:
        """Yields prompts without end. The texts are cut at other places in each round and phase, because the
        KV of a repeated prompt could still be cached."""
        # Each prompt begins with the text's start token.
        length = self.prompt_tokens - 1
        for round_ in itertools.count(first, len(PHASES)):
            offset = 1 + round_ * 13 % length
            cuts = [
                (ids[0], *ids[start : start + length])
                for ids in self._documents[domain]
                for start in range(offset, len(ids) - length + 1, length)
            ]
            random.Random(round_).shuffle(cuts)
            yield from cuts
