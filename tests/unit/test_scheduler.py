"""No block is lost, none that others read is written to, and nothing starves, whatever comes."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.engine.block_pool import BlockPool
from helios.engine.chunk_budget import ChunkBudget
from helios.engine.detokenizer import Detokenizer
from helios.engine.scheduler import Scheduler
from helios.engine.sequence import Sequence, SequenceState
from helios.sampling import SamplingParams
from tests.opt_variants import byte_tokenizer

TOKENIZER = byte_tokenizer()
BLOCK_TOKENS = 4
CONTEXT = 32


def make_sequence(name: str, prompt: int, output: int) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=list(range(prompt)),
        prompt_tokens=prompt,
        sampling=SamplingParams(max_tokens=output),
        detokenizer=Detokenizer(TOKENIZER, ()),
        sink=[].append,
    )


class Cache:
    """What each slot of the blocks holds: the tokens up to and with its own."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], list[int]] = {}

    def copy(self, source: int, target: int) -> None:
        for offset in range(BLOCK_TOKENS):
            self.slots[target, offset] = self.slots[source, offset]

    def write(self, sequence: Sequence, position: int) -> None:
        slot = (sequence.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
        self.slots[slot] = sequence.token_ids[: position + 1]

    def check(self, sequence: Sequence) -> None:
        """All that counts as computed is there, and is of this text."""
        for position in range(sequence.computed):
            slot = (sequence.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
            assert self.slots[slot] == sequence.token_ids[: position + 1]


def advance(scheduler: Scheduler, scheduled: list[tuple[Sequence, int]], cache: Cache | None = None) -> None:
    """What a step does to the sequences, without a model."""
    if cache is not None:
        for sequence, count in scheduled:
            cache.check(sequence)
            for position in range(sequence.computed, sequence.computed + count):
                cache.write(sequence, position)
    for sequence, count in scheduled:
        scheduler.advance(sequence, count)
        if sequence.pending == 0:
            sequence.token_ids.append(0)
            if sequence.completion_tokens == sequence.sampling.max_tokens:
                scheduler.finish(sequence)


class SchedulerMachine(RuleBasedStateMachine):
    """Submissions, steps and cancellations in any order. All prompts begin alike."""

    @initialize(
        blocks=st.integers(CONTEXT // BLOCK_TOKENS, 24),
        running=st.integers(1, 6),
        budget=st.integers(6, 40),
        stretch=st.sampled_from([1.5, 4, math.inf]),
        sharing=st.booleans(),
    )
    def start(self, blocks: int, running: int, budget: int, stretch: float, sharing: bool) -> None:
        self.pool = BlockPool(blocks, BLOCK_TOKENS)
        self.budget = budget
        self.max_running = running
        self.sharing = sharing
        self.cache = Cache()
        chunks = ChunkBudget(stretch, BLOCK_TOKENS, budget)
        self.scheduler = Scheduler(self.pool, running, budget, chunks, self.cache.copy if sharing else None)
        self.all: list[Sequence] = []

    @rule(prompt=st.integers(1, CONTEXT - 1), data=st.data())
    def submit(self, prompt: int, data: st.DataObject) -> None:
        output = data.draw(st.integers(1, CONTEXT - prompt))
        sequence = make_sequence(str(len(self.all)), prompt, output)
        self.all.append(sequence)
        self.scheduler.add(sequence)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        living = list(self.scheduler)
        if living:
            self.scheduler.finish(data.draw(st.sampled_from(living)))

    @rule()
    def preempt_all(self) -> None:
        self.scheduler.preempt_all()

    @rule()
    def step(self) -> None:
        living = list(self.scheduler)
        oldest = min(living, key=lambda sequence: sequence.arrival) if living else None
        scheduled = self.scheduler.schedule()
        assert sum(count for _, count in scheduled) <= self.budget
        assert len({id(sequence) for sequence, _ in scheduled}) == len(scheduled)
        for sequence, count in scheduled:
            assert sequence.state is SequenceState.RUNNING
            assert 1 <= count <= sequence.pending
            assert len(sequence.blocks) * BLOCK_TOKENS >= sequence.computed + count
        if oldest is not None:
            assert oldest in [sequence for sequence, _ in scheduled], "the oldest always moves"
        advance(self.scheduler, scheduled, self.cache)
        decoding = sum(count == 1 for _, count in scheduled)
        prompt_tokens = sum(count for _, count in scheduled if count > 1)
        self.scheduler.chunks.observe(decoding, prompt_tokens, 1e-3 * decoding + 1e-4 * prompt_tokens)

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        if not hasattr(self, "pool"):
            return
        holders = Counter(block for sequence in self.all for block in sequence.blocks)
        assert len(holders) + self.pool.free_blocks == self.pool.num_blocks
        assert self.sharing or set(holders.values()) <= {1}
        for sequence in self.scheduler.running:
            assert len(sequence.blocks) == len(set(sequence.blocks))
            for block in sequence.blocks[sequence.computed // BLOCK_TOKENS :]:
                assert holders[block] == 1, "what is still written to is nobody else's"

    @invariant()
    def only_running_sequences_hold_blocks(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert len(self.scheduler.running) <= self.max_running
        for sequence in self.all:
            assert bool(sequence.blocks) == (sequence in self.scheduler.running)
        arrivals = [sequence.arrival for sequence in self.scheduler.waiting]
        assert arrivals == sorted(arrivals)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        work = sum(len(s.token_ids) + s.sampling.max_tokens + 1 for s in self.all)
        for _ in range(work * len(self.all)):
            if not list(self.scheduler):
                break
            advance(self.scheduler, self.scheduler.schedule(), self.cache)
        assert all(sequence.state is SequenceState.FINISHED for sequence in self.all), "every sequence ends"
        assert self.pool.free_blocks == self.pool.num_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_sequences_that_a_reload_moved_are_computed_before_new_ones_are_in_small_chunks() -> None:
    budget = 40
    scheduler = Scheduler(BlockPool(64, 8), 8, budget, ChunkBudget(2, 8, budget), None)
    scheduler.chunks.observe(0, 32, 32.0)  # a second a token
    for decoding in (1, 2, 4, 8):
        scheduler.chunks.observe(decoding, 0, 4.0)
    sequences = [make_sequence(f"{number}", 20, 20) for number in range(7)]
    for sequence in sequences[:4]:
        scheduler.add(sequence)
    while any(sequence.pending > 1 for sequence in sequences[:4]):
        advance(scheduler, scheduler.schedule())
    scheduler.moved_until = scheduler.preempt_all()
    assert scheduler.moved_until == sequences[3].arrival
    for sequence in sequences[4:]:
        scheduler.add(sequence)
    sizes = []
    while scheduler.waiting or any(sequence.pending > 1 for sequence in scheduler.running):
        scheduled = scheduler.schedule()
        sizes.append(sum(tokens for _, tokens in scheduled))
        advance(scheduler, scheduled)
    moved = sum(len(sequence.token_ids) for sequence in sequences[:4])
    assert moved > 80
    assert sizes[:2] == [budget, budget]
    assert max(sizes[4:]) < budget


@given(st.integers(1, 20))
def test_decoding_sequences_never_wait_for_a_prefill(chunk: int) -> None:
    scheduler = Scheduler(
        BlockPool(64, BLOCK_TOKENS), 4, 4 + chunk, ChunkBudget(math.inf, BLOCK_TOKENS, 4 + chunk), None
    )
    decoding = make_sequence("decoding", 3, 20)
    scheduler.add(decoding)
    advance(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("long prompt", 31, 1))
    while len(list(scheduler)) == 2:
        before = decoding.completion_tokens
        advance(scheduler, scheduler.schedule())
        assert decoding.completion_tokens == before + 1
