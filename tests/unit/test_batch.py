"""The rows of a step: their order, and what is known of their depths."""

import pytest
import torch

from helios.engine.scheduling.batch import Batch, build_batch
from helios.engine.scheduling.detokenizer import Detokenizer
from helios.engine.scheduling.prompt_readings import PromptReadings
from helios.engine.scheduling.sequence import Sequence
from helios.sampling import SamplingParams
from helios.served import ServedPlan

BLOCK_TOKENS = 16
# A decode, a whole prompt, a part of a prompt: tokens that are known, of the prompt, computed, to compute.
DECODE, WHOLE, PART = (9, 4, 8, 1), (40, 40, 0, 40), (90, 90, 32, 5)


def sequence_of(kind: tuple[int, int, int, int], depth: int, number: int) -> tuple[Sequence, int]:
    """A sequence whose token ids begin with 1000 * number, in blocks from 10 * number on."""
    tokens, prompt, computed, count = kind
    ids = [1000 * number + index for index in range(tokens)]
    plan, detokenizer = ServedPlan(model="one", depth=depth), Detokenizer.__new__(Detokenizer)
    sequence = Sequence(f"{number}", ids, prompt, SamplingParams(), detokenizer, lambda _: None, plan)
    sequence.computed = computed
    sequence.blocks = [10 * number + index for index in range(-(-tokens // BLOCK_TOKENS))]
    return sequence, count


def order_of(batch: Batch) -> list[int]:
    """Numbers of the sequences in the order of their first rows."""
    return list(dict.fromkeys((batch.token_ids // 1000).tolist()))


def test_rows_of_one_depth_are_decodes_then_prompts_as_scheduled() -> None:
    kinds = (WHOLE, DECODE, PART, DECODE)
    scheduled = [sequence_of(kind, 6, number) for number, kind in enumerate(kinds)]
    batch, readers = build_batch(scheduled, BLOCK_TOKENS, torch.device("cpu"))
    assert order_of(batch) == [1, 3, 0, 2]
    assert [seq.request_id for seq in readers] == ["1", "3", "0"]
    assert batch.read_rows.tolist() == [0, 1, 41]
    assert batch.chunks == ((2, 42, True), (42, 47, False))
    assert (batch.rows, batch.decode_rows, batch.depths, batch.depth) == (47, 2, ((6, 0),), 6)


def test_rows_that_go_deeper_come_first() -> None:
    kinds = ((DECODE, 2), (WHOLE, 6), (DECODE, 12), (PART, 2), (DECODE, 6), (PART, 12), (WHOLE, 2))
    scheduled = [sequence_of(kind, depth, number) for number, (kind, depth) in enumerate(kinds)]
    readings = PromptReadings(2)
    batch, readers = build_batch(scheduled, BLOCK_TOKENS, torch.device("cpu"), readings)
    # Depth 12: a decode and 5 rows. Depth 6: a decode and 40 rows. Depth 2: a decode, 5 rows and 40 rows.
    assert order_of(batch) == [2, 5, 4, 1, 0, 3, 6]
    assert batch.depths == ((2, 47), (6, 6), (12, 0))
    assert (batch.rows, batch.decode_rows) == (93, 3)
    assert batch.chunks == ((1, 6, False), (7, 47, True), (48, 53, False), (53, 93, True))
    assert [seq.request_id for seq in readers] == ["2", "4", "1", "0", "6"]
    assert batch.read_rows.tolist()[:5] == [0, 6, 46, 47, 92]
    # Then the sampled rows of the two whole prompts, each followed by the token after it.
    read = batch.read_rows[5:]
    assert len(read) == 4
    assert readings.targets == (batch.token_ids[read] + 1).tolist()
    assert (batch.token_ids[read] // 1000).tolist() == [1, 1, 6, 6]
    for row in range(batch.rows):
        number, token = divmod(int(batch.token_ids[row]), 1000)
        block, place = divmod(int(batch.slots[row]), BLOCK_TOKENS)
        assert (int(batch.positions[row]), block, place) == (token, 10 * number + token // 16, token % 16)
        assert batch.tables[batch.row_tables[row], 0] == 10 * number


def test_a_batch_of_several_depths_has_no_single_one() -> None:
    scheduled = [sequence_of(DECODE, depth, depth) for depth in (2, 6)]
    batch, _ = build_batch(scheduled, BLOCK_TOKENS, torch.device("cpu"))
    with pytest.raises(ValueError, match="too many"):
        _ = batch.depth
