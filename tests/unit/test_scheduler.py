"""No block is lost or shared, and nothing starves, whatever comes."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.engine.detokenizer import Detokenizer
from helios.engine.kv_cache import BlockPool
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


def advance(scheduler: Scheduler, scheduled: list[tuple[Sequence, int]]) -> None:
    """What a step does to the sequences, without a model."""
    for sequence, count in scheduled:
        sequence.computed += count
        if sequence.pending == 0:
            sequence.token_ids.append(0)
            if sequence.completion_tokens == sequence.sampling.max_tokens:
                scheduler.finish(sequence)


class SchedulerMachine(RuleBasedStateMachine):
    """Submissions, steps and cancellations in any order."""

    @initialize(
        blocks=st.integers(CONTEXT // BLOCK_TOKENS, 24), running=st.integers(1, 6), budget=st.integers(6, 40)
    )
    def start(self, blocks: int, running: int, budget: int) -> None:
        self.pool = BlockPool(blocks, BLOCK_TOKENS)
        self.budget = budget
        self.max_running = running
        self.scheduler = Scheduler(self.pool, running, budget)
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
        advance(self.scheduler, scheduled)

    @invariant()
    def every_block_is_free_or_held_once(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = [block for sequence in self.all for block in sequence.blocks]
        assert len(held) == len(set(held))
        assert len(held) + self.pool.free_blocks == self.pool.num_blocks

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
            advance(self.scheduler, self.scheduler.schedule())
        assert all(sequence.state is SequenceState.FINISHED for sequence in self.all), "every sequence ends"
        assert self.pool.free_blocks == self.pool.num_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.integers(1, 20))
def test_decoding_sequences_never_wait_for_a_prefill(chunk: int) -> None:
    scheduler = Scheduler(BlockPool(64, BLOCK_TOKENS), 4, step_token_budget=4 + chunk)
    decoding = make_sequence("decoding", 3, 20)
    scheduler.add(decoding)
    advance(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("long prompt", 31, 1))
    while len(list(scheduler)) == 2:
        before = decoding.completion_tokens
        advance(scheduler, scheduler.schedule())
        assert decoding.completion_tokens == before + 1
