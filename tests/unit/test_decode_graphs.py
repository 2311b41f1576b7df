"""The code that graphs capture gives the same results as the plain step. For CUDA see test_gpu.py."""

from pathlib import Path

import pytest
import torch

from helios.engine.backends.burst import ONE_STEP
from helios.engine.backends.cuda_graphs import PaddedDecode
from helios.engine.backends.kv_cache import KVCache
from helios.engine.plan import load_plan
from helios.engine.scheduling.batch import Batch, build_batch
from helios.engine.scheduling.detokenizer import Detokenizer
from helios.engine.scheduling.sequence import Sequence
from helios.engine.settings import EngineSettings
from helios.sampling import SamplingParams
from helios.served import ServedPlan
from tests.opt_variants import byte_tokenizer
from tests.variants import VARIANTS, save_variant

BLOCK_TOKENS, BLOCKS = 4, 16
PLAN = ServedPlan(model="random", depth=6)


def decodes(lengths: list[int], seed: int) -> Batch:
    """A decode step of sequences with these lengths, each on separate blocks."""
    generator = torch.Generator().manual_seed(seed)
    free = iter(torch.randperm(BLOCKS, generator=generator).tolist())
    scheduled = []
    for length in lengths:
        ids = torch.randint(4, 99, (length,), generator=generator).tolist()
        detokenizer = Detokenizer(byte_tokenizer(), ())
        sequence = Sequence("", ids, length - 1, SamplingParams(), detokenizer, lambda _: None, PLAN)
        sequence.blocks = [next(free) for _ in range(-(-length // BLOCK_TOKENS))]
        sequence.computed = length - 1
        scheduled.append((sequence, 1))
    return build_batch(scheduled, BLOCK_TOKENS, torch.device("cpu"))[0]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_padding_changes_neither_logits_nor_the_blocks_of_others(tmp_path: Path, variant: str) -> None:
    save_variant(tmp_path, variant, 3)
    plan = load_plan(tmp_path, None, EngineSettings(memory_bytes=64 << 20, block_tokens=BLOCK_TOKENS))
    torch.manual_seed(0)
    caches = [
        KVCache.of(
            plan.model.config, plan.depth, BLOCKS + 1, BLOCK_TOKENS, torch.float32, torch.device("cpu")
        )
        for _ in range(2)
    ]
    for own, other in zip(
        (*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True
    ):
        own.normal_()
        other.copy_(own)
    padded = PaddedDecode(plan.model, caches[0], depth=plan.depth, rows=8, blocks=4, spare_block=BLOCKS)
    # The second batch is smaller. Nothing of the first may be left in the buffers.
    for seed, lengths in enumerate(([5, 1, 9, 12, 3], [2, 16])):
        batch = decodes(lengths, seed)
        padded.fill(batch)
        # Cloned, because the next step of the same model overwrites these logits.
        logits = padded.compute().logits[: len(lengths)].clone()
        expected, _ = plan.runner.run(batch, caches[1], ONE_STEP)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
        for own, other in zip(
            (*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True
        ):
            torch.testing.assert_close(own[:BLOCKS], other[:BLOCKS], rtol=1e-4, atol=1e-4)
