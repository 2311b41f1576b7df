"""The KV space that an evaluation needs, and sequences placed in it."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tokenizers import Tokenizer

from helios.catalog import ModelEntry
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.evaluation.settings import EvaluationSettings
from helios.engine.scheduling.block_pool import BlockPool
from helios.engine.scheduling.detokenizer import Detokenizer
from helios.engine.scheduling.sequence import Sequence
from helios.sampling import SamplingParams
from helios.served import ServedPlan

# Requests whose continuations are decoded in one batch.
GROUP = 8
# Steps are timed with a decode context of this many tokens and a prefill of this many prompts, for any
# traffic.
_TIMED_CONTEXT = 128
TIMED_PROMPTS = 2


@dataclass(frozen=True, slots=True)
class Space:
    """The KV blocks that evaluating a model on some prompts needs."""

    num_blocks: int
    block_tokens: int
    # Tokens of each timed sequence.
    timed_context: int
    # The model with all layers.
    served: ServedPlan

    @classmethod
    def plan(
        cls, entry: ModelEntry, ids: Seq[Seq[int]], settings: EvaluationSettings, *, timing: bool = True
    ) -> "Space":
        """The space for these prompts and, with `timing`, for the timed steps."""
        timed_context = min(_TIMED_CONTEXT, entry.context_tokens)
        pool = BlockPool(0, settings.block_tokens)
        longest = max(map(len, ids)) + settings.generated_tokens
        num_blocks = min(len(ids), GROUP) * pool.blocks_for(longest)
        if timing:
            sequences = max(settings.batches[-1], TIMED_PROMPTS)
            num_blocks = max(num_blocks, sequences * pool.blocks_for(timed_context))
        served = ServedPlan(model=entry.name, depth=entry.num_layers)
        return cls(num_blocks, settings.block_tokens, timed_context, served)

    def cache(self, model: Model) -> KVCache:
        """The KV cache of all layers."""
        return KVCache.of(
            model.config, model.depth, self.num_blocks, self.block_tokens, model.kv_dtype, model.device
        )

    def sequences(self, tokenizer: Tokenizer, ids: Seq[Seq[int]], room: int = 0) -> list[Sequence]:
        """Sequences with blocks for these tokens and `room` more. They may use any block of the cache."""
        pool = BlockPool(self.num_blocks, self.block_tokens)
        return [
            sequence_of(self.served, tokenizer, one, pool.allocate(pool.blocks_for(len(one) + room)))
            for one in ids
        ]


def sequence_of(plan: ServedPlan, tokenizer: Tokenizer, ids: Seq[int], blocks: list[int]) -> Sequence:
    """A sequence that nobody waits for: tokens and blocks, nothing computed yet."""
    return Sequence(
        request_id="",
        token_ids=list(ids),
        prompt_tokens=len(ids),
        sampling=SamplingParams(),
        detokenizer=Detokenizer(tokenizer, ()),
        sink=lambda _: None,
        plan=plan,
        blocks=blocks,
    )
