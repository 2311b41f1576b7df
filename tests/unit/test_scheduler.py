"""For any input, no block is lost, no shared block is written to, and no sequence starves."""

import math
from collections import Counter
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.engine.move import Move
from helios.engine.scheduling.block_pool import BlockPool
from helios.engine.scheduling.chunk_budget import ChunkBudget
from helios.engine.scheduling.detokenizer import Detokenizer
from helios.engine.scheduling.scheduler import Scheduler
from helios.engine.scheduling.sequence import Sequence, SequenceState
from helios.sampling import SamplingParams
from helios.served import ServedPlan
from tests.opt_variants import byte_tokenizer

TOKENIZER = byte_tokenizer()
BLOCK_TOKENS = 4
CONTEXT = 32
SHALLOW, DEPTH = 2, 4


def plan(number: int, depth: int = DEPTH) -> ServedPlan:
    """A plan of the model number `number` of those to which sequences move."""
    return ServedPlan(model=f"model-{number}", depth=depth)


def make_sequence(name: str, prompt: int, output: int, served: ServedPlan | None = None) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=list(range(prompt)),
        prompt_tokens=prompt,
        sampling=SamplingParams(max_tokens=output),
        detokenizer=Detokenizer(TOKENIZER, ()),
        sink=[].append,
        plan=served or plan(0),
    )


class Cache:
    """The content of each KV slot of each layer: the model that wrote it, and the tokens up to its own."""

    def __init__(self, layer_blocks: list[int]) -> None:
        self.layer_blocks = layer_blocks
        self.slots: dict[tuple[int, int, int], tuple[str, list[int]]] = {}

    def resize(self, layer_blocks: list[int]) -> None:
        self.layer_blocks = layer_blocks
        self.slots = {
            slot: content for slot, content in self.slots.items() if slot[1] < layer_blocks[slot[0]]
        }

    def copy(self, source: int, target: int) -> None:
        for layer, count in enumerate(self.layer_blocks):
            for offset in range(BLOCK_TOKENS):
                if max(source, target) < count and (layer, source, offset) in self.slots:
                    self.slots[layer, target, offset] = self.slots[layer, source, offset]

    def write(self, sequence: Sequence, position: int) -> None:
        for slot in self._slots_of(sequence, position):
            assert slot[1] < self.layer_blocks[slot[0]], "its layers have all its blocks"
            self.slots[slot] = self._content(sequence, position)

    def check(self, sequence: Sequence) -> None:
        """Checks that all computed slots of its layers hold this text, written by the sequence's model."""
        for position in range(sequence.computed):
            for slot in self._slots_of(sequence, position):
                assert self.slots[slot] == self._content(sequence, position)

    def _slots_of(self, sequence: Sequence, position: int) -> Iterator[tuple[int, int, int]]:
        block = sequence.blocks[position // BLOCK_TOKENS]
        return ((layer, block, position % BLOCK_TOKENS) for layer in range(sequence.plan.depth))

    def _content(self, sequence: Sequence, position: int) -> tuple[str, list[int]]:
        return sequence.plan.model, sequence.token_ids[: position + 1]


def advance(scheduler: Scheduler, scheduled: list[tuple[Sequence, int]], cache: Cache | None = None) -> None:
    """Does what a step does to the sequences, without a model."""
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
    """Submissions, steps and cancellations in any order. All prompts begin alike.

    Sequences have few layers or all. Some blocks have only few.
    """

    @initialize(
        deep=st.integers(CONTEXT // BLOCK_TOKENS, 24),
        shallow=st.integers(0, 10),
        running=st.integers(1, 6),
        budget=st.integers(6, 40),
        stretch=st.sampled_from([1.5, 4, math.inf]),
        sharing=st.booleans(),
    )
    def start(
        self, deep: int, shallow: int, running: int, budget: int, stretch: float, sharing: bool
    ) -> None:
        self.layer_blocks = [deep + shallow] * SHALLOW + [deep] * (DEPTH - SHALLOW)
        self.pool = BlockPool(deep + shallow, BLOCK_TOKENS)
        self.pool.resize(self.layer_blocks)
        self.stretch = stretch
        self.budget = budget
        self.max_running = running
        self.sharing = sharing
        self.cache = Cache(self.layer_blocks)
        copy = self.cache.copy if sharing else None
        self.scheduler = Scheduler(self.pool, running, budget, self.new_chunks(), copy)
        self.plans = 0
        self.move: Move | None = None
        self.all: list[Sequence] = []

    @rule(prompt=st.integers(1, CONTEXT - 1), depth=st.sampled_from([SHALLOW, DEPTH]), data=st.data())
    def submit(self, prompt: int, depth: int, data: st.DataObject) -> None:
        output = data.draw(st.integers(1, CONTEXT - prompt))
        sequence = make_sequence(str(len(self.all)), prompt, output, plan(self.plans, depth))
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

    def new_chunks(self) -> ChunkBudget:
        return ChunkBudget(self.stretch, BLOCK_TOKENS, self.budget)

    @precondition(lambda self: self.move is None)
    @rule(data=st.data())
    def begin_move(self, data: st.DataObject) -> None:
        """Begins a move to plans that may have fewer blocks. Some plans may stay."""
        blocks = data.draw(st.integers(CONTEXT // BLOCK_TOKENS, self.pool.num_blocks))
        depths = data.draw(st.sampled_from([(SHALLOW, DEPTH), (SHALLOW,), (DEPTH,)]))
        to = {plan(self.plans, depth): plan(self.plans + 1, depth) for depth in depths}
        fewer = [min(blocks, count) for count in self.layer_blocks]
        self.move = Move(self.scheduler, to, self.budget, last_step=0.0)
        self.move.begin(fewer, self.new_chunks())
        self.cache.resize(fewer)
        self.plans += 1

    def schedule(self) -> list[tuple[Sequence, int]]:
        scheduled = self.scheduler.schedule(0 if self.move is None else self.move.send_back())
        if self.move is not None and not self.move.is_leaving:
            self.move = None
            self.pool.resize(self.layer_blocks)
            self.cache.resize(self.layer_blocks)
        return scheduled

    @rule()
    def step(self) -> None:
        living = list(self.scheduler)
        oldest = min(living, key=lambda sequence: sequence.arrival) if living else None
        scheduled = self.schedule()
        assert sum(count for _, count in scheduled) <= self.budget
        assert len({id(sequence) for sequence, _ in scheduled}) == len(scheduled)
        for sequence, count in scheduled:
            assert sequence.state is SequenceState.RUNNING
            assert 1 <= count <= sequence.pending
            assert sequence.is_decoding or sequence.next_plan is None
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
            advance(self.scheduler, self.schedule(), self.cache)
        assert self.move is None or not list(self.scheduler)
        assert all(sequence.state is SequenceState.FINISHED for sequence in self.all), "every sequence ends"
        assert self.pool.free_blocks == self.pool.num_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def moving(prompts: list[int], room: int) -> tuple[Scheduler, Move, list[Sequence]]:
    """Decoding sequences, and a move that has room for `room` prompt tokens per step."""
    budget = room + len(prompts)
    scheduler = Scheduler(BlockPool(64, 8), 16, budget, ChunkBudget(math.inf, 8, budget), None)
    sequences = [make_sequence(f"{number}", prompt, 40) for number, prompt in enumerate(prompts)]
    for sequence in sequences:
        scheduler.add(sequence)
    while not all(sequence.is_decoding for sequence in sequences):
        advance(scheduler, scheduler.schedule())
    move = Move(scheduler, {plan(0): plan(1)}, budget, last_step=0.0)
    move.begin([64] * DEPTH, ChunkBudget(math.inf, 8, budget))
    return scheduler, move, sequences


def is_leaving(sequence: Sequence) -> bool:
    """Whether the sequence is still under the old plan."""
    return sequence.plan == plan(0)


def test_sequences_move_few_at_a_time_and_the_others_go_on() -> None:
    scheduler, move, sequences = moving([20] * 6, room=50)
    stood_still = Counter[str]()
    steps = 0
    while any(map(is_leaving, sequences)):
        before = {sequence.request_id: sequence.completion_tokens for sequence in sequences}
        advance(scheduler, scheduler.schedule(move.send_back()))
        steps += 1
        for sequence in sequences:
            stood_still[sequence.request_id] += sequence.completion_tokens == before[sequence.request_id]
    assert not move.is_leaving
    assert steps >= 3, "two fit into a step"
    # A sequence that is sent back is computed again in the same step.
    assert max(stood_still.values()) == 0
    assert [sequence.preemptions for sequence in sequences] == [1] * 6


def test_nobody_is_sent_back_behind_a_long_sequence_that_moves() -> None:
    scheduler, move, (first, *others) = moving([100, 20, 20], room=30)
    stood_still = steps = 0
    while any(map(is_leaving, (first, *others))):
        before = first.completion_tokens
        advance(scheduler, scheduler.schedule(move.send_back()))
        steps += 1
        if first.completion_tokens == before:
            stood_still += 1
            assert all(map(is_leaving, others))
    assert stood_still == 3, "of its prefill's four steps the last gave it a token"
    # It kept decoding until there was room for all of it.
    assert steps > 6
    assert [sequence.preemptions for sequence in (first, *others)] == [1, 1, 1]


def test_a_long_prefill_earns_nobody_a_longer_stall() -> None:
    scheduler, move, (first, *others) = moving([100, *[20] * 8], room=40)
    while is_leaving(first) or first.pending > 1:
        advance(scheduler, scheduler.schedule(move.send_back()))
    while any(map(is_leaving, others)):
        before = [sequence.completion_tokens for sequence in others]
        advance(scheduler, scheduler.schedule(move.send_back()))
        assert all(sequence.completion_tokens > had for sequence, had in zip(others, before, strict=True))


def test_new_prompts_have_their_share_while_others_move() -> None:
    scheduler, move, sequences = moving([20] * 8, room=64)
    new = make_sequence("new", 120, 9, plan(1))
    scheduler.add(new)
    steps = 0
    while not new.completion_tokens:
        advance(scheduler, scheduler.schedule(move.send_back()))
        steps += 1
    assert steps <= 5
    assert any(map(is_leaving, sequences))


def test_what_does_not_fit_into_a_smaller_pool_is_sent_back_at_once() -> None:
    scheduler = Scheduler(BlockPool(64, 8), 16, 54, ChunkBudget(math.inf, 8, 54), None)
    sequences = [make_sequence(f"{number}", 20, 40) for number in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    while not all(sequence.is_decoding for sequence in sequences):
        advance(scheduler, scheduler.schedule())
    kept = max(sequences[1].blocks) + 1
    Move(scheduler, {plan(0): plan(1)}, 54, last_step=0.0).begin([kept] * DEPTH, scheduler.chunks)
    assert list(map(is_leaving, sequences)) == [True, True, False, False]
    assert list(scheduler.waiting) == sequences[2:]
    assert scheduler.pool.num_blocks == kept


def test_sequences_that_a_reload_moved_are_computed_before_new_ones_are_in_small_chunks() -> None:
    budget = 40
    scheduler = Scheduler(BlockPool(64, 8), 8, budget, ChunkBudget(2, 8, budget), None)
    scheduler.chunks.observe(0, 32, 32.0)  # one second per token
    for decoding in (1, 2, 4, 8):
        scheduler.chunks.observe(decoding, 0, 4.0)
    sequences = [make_sequence(f"{number}", 20, 20) for number in range(7)]
    for sequence in sequences[:4]:
        scheduler.add(sequence)
    while any(sequence.pending > 1 for sequence in sequences[:4]):
        advance(scheduler, scheduler.schedule())
    scheduler.unbounded_until = scheduler.preempt_all()
    assert scheduler.unbounded_until == sequences[3].arrival
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


def shallow_and_deep(deep: int, shallow: int) -> Scheduler:
    """A scheduler with blocks of all layers, and others of few layers."""
    pool = BlockPool(deep + shallow, BLOCK_TOKENS)
    pool.resize([deep + shallow] * SHALLOW + [deep] * (DEPTH - SHALLOW))
    return Scheduler(pool, 16, 64, ChunkBudget(math.inf, BLOCK_TOKENS, 64), None)


def test_nobody_is_preempted_for_a_sequence_that_cannot_use_its_blocks() -> None:
    scheduler = shallow_and_deep(deep=8, shallow=8)
    first, second = (make_sequence(name, 16, 15, plan(0, DEPTH)) for name in ("first", "second"))
    shallow = make_sequence("shallow", 16, 15, plan(0, SHALLOW))
    for sequence in (first, second, shallow):
        scheduler.add(sequence)
    while not all(sequence.state is SequenceState.FINISHED for sequence in (first, second, shallow)):
        advance(scheduler, scheduler.schedule())
    assert [sequence.preemptions for sequence in (first, second, shallow)] == [0, 1, 0]


def test_a_shallow_sequence_gives_its_deep_blocks_to_an_older_deep_one() -> None:
    scheduler = shallow_and_deep(deep=8, shallow=2)
    deep, shallow = make_sequence("deep", 12, 19, plan(0, DEPTH)), make_sequence("s", 24, 7, plan(0, SHALLOW))
    for sequence in (deep, shallow):
        scheduler.add(sequence)
    advance(scheduler, scheduler.schedule())
    # Blocks of few layers were taken first.
    assert sum(block >= 8 for block in shallow.blocks) == 2
    while not all(sequence.state is SequenceState.FINISHED for sequence in (deep, shallow)):
        advance(scheduler, scheduler.schedule())
    assert (deep.preemptions, shallow.preemptions) == (0, 1)


def test_blocks_are_reserved_for_all_depths_or_for_none() -> None:
    scheduler = shallow_and_deep(deep=7, shallow=3)
    deep, shallow = make_sequence("deep", 8, 9, plan(0, DEPTH)), make_sequence("s", 8, 9, plan(0, SHALLOW))
    for sequence in (deep, shallow):
        scheduler.add(sequence)
    advance(scheduler, scheduler.schedule())
    free = scheduler.pool.free_blocks
    assert not scheduler.reserve([deep], 5 * BLOCK_TOKENS), (
        "six blocks are free, five of them have all layers"
    )
    assert not scheduler.reserve([shallow, deep], 3 * BLOCK_TOKENS)
    assert scheduler.pool.free_blocks == free
    assert scheduler.reserve([shallow, deep], 2 * BLOCK_TOKENS)
    assert max(deep.blocks) < 7


def test_blocks_of_few_layers_are_used_while_a_deep_sequence_waits_for_others() -> None:
    scheduler = shallow_and_deep(deep=8, shallow=7)
    running, waiting = (make_sequence(name, 20, 11, plan(0, DEPTH)) for name in ("running", "waiting"))
    # Three of four fit into the blocks of few layers. The fourth would need one that `waiting` can use.
    shallow = [make_sequence(f"{number}", 6, 3, plan(0, SHALLOW)) for number in range(4)]
    late = make_sequence("late", 4, 4, plan(0, DEPTH))
    for sequence in (running, waiting, *shallow, late):
        scheduler.add(sequence)
    for _ in range(2):
        advance(scheduler, scheduler.schedule())
        assert set(scheduler.running) == {running, *shallow[:3]}
    assert list(scheduler.waiting) == [waiting, shallow[3], late]
    while running.state is not SequenceState.FINISHED:
        assert waiting.state is SequenceState.WAITING
        advance(scheduler, scheduler.schedule())
    advance(scheduler, scheduler.schedule())
    assert waiting.state is SequenceState.RUNNING
    while list(scheduler):
        advance(scheduler, scheduler.schedule())
    assert scheduler.preemptions == 0
