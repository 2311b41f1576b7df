"""The KV that an evaluation needs, and the sequences that lie in it."""

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

# Requests that are continued in one batch.
GROUP = 8
# Steps are timed at this context of a decode and over this many prompts of a prefill, whatever the traffic.
_TIMED_CONTEXT = 128
TIMED_PROMPTS = 2


@dataclass(frozen=True, slots=True)
class Space:
    """The blocks of KV that evaluating a model on some prompts needs."""

    num_blocks: int
    block_tokens: int
    # Tokens of the sequences that are timed.
    timed_context: int
    # The model whole.
    served: ServedPlan

    @classmethod
    def plan(
        cls, entry: ModelEntry, ids: Seq[Seq[int]], settings: EvaluationSettings, *, timing: bool = True
    ) -> "Space":
        """What these prompts need, and with `timing` also the steps that are timed."""
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
        """The KV of all layers."""
        return KVCache.of(
            model.config, model.depth, self.num_blocks, self.block_tokens, model.kv_dtype, model.device
        )

    def sequences(self, tokenizer: Tokenizer, ids: Seq[Seq[int]], room: int = 0) -> list[Sequence]:
        """Sequences of these tokens with blocks for them and `room` more; they own the whole cache."""
        pool = BlockPool(self.num_blocks, self.block_tokens)
        return [
            sequence_of(self.served, tokenizer, one, pool.allocate(pool.blocks_for(len(one) + room)))
            for one in ids
        ]


def sequence_of(plan: ServedPlan, tokenizer: Tokenizer, ids: Seq[int], blocks: list[int]) -> Sequence:
    """A sequence that nobody waits for: tokens, and blocks for them. Nothing of it is computed."""
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
