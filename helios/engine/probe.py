"""Probes prompts before they have a plan, and lets their routes choose one.

The first tokens of a prompt go through the first layers of one loaded model, and of the others where this one
does not say enough. A sample of them is read out at the first exit: how well does the model predict the
prompt's own next tokens? Where a sample under all models is not enough either, all are read out. What the
chosen model has computed is kept, and prefill goes on with it where that is quicker.
"""

import math
from array import array
from collections import deque
from collections.abc import Callable, Container, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch

from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.kernels.team import TEAM
from helios.engine.plan import Plan
from helios.engine.scheduling.batch import Batch
from helios.engine.scheduling.probed_layers import ProbedLayers
from helios.engine.scheduling.sequence import Sequence, SequenceState
from helios.engine.settings import EngineSettings
from helios.errors import PlanNotServedError, SequenceFailedError
from helios.routing.probe import ExitReading, Probe, read_positions
from helios.served import ServedPlan

# With at least this many rows per thread, prefill goes on where probes ended. It is one more pass over the
# weights of the other layers. Fewer rows are computed again in the step of the rest sooner than in a pass of
# their own.
LEAST_ROWS = 128

# Token ids, and the blocks of their KV.
_Text: TypeAlias = tuple[Seq[int], Seq[int]]


@dataclass(slots=True, eq=False)
class _Beginning:
    """A sequence's first tokens, and what models have said of them."""

    seq: Sequence
    ids: tuple[int, ...]
    # Positions that are read out, and the prompt's own next token at each. Empty: the prompt is not probed.
    positions: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    # Whether more positions could be read out.
    is_sample: bool = False
    # Where every model writes its KV.
    slot: int = 0
    # By model. The states are those of all tokens after the first exit.
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    readings: Mapping[str, ExitReading] = field(default_factory=dict)
    # Why it gets no plan.
    error: Exception | None = None

    @property
    def is_probed(self) -> bool:
        return bool(self.positions)

    def read(self, most: int) -> None:
        """Chooses at most so many positions that are read out."""
        every = len(read_positions(len(self.ids), len(self.ids)))
        self.positions = read_positions(len(self.ids), most)
        self.targets = [self.seq.token_ids[position + 1] for position in self.positions]
        self.is_sample = len(self.positions) < every


class Prober:
    """The sequences that wait for a plan, and what was computed of their first tokens to choose it.

    The KV of a probe is in a cache of its own, one for each model, with a slot for each prompt. Slots and
    states are kept for at most `max_running` sequences. What is not kept is computed again.
    All methods run on the engine's thread, between two steps.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._tokens = min(settings.probe_tokens, settings.step_token_budget)
        self._least_tokens = max(1, settings.min_probe_tokens)
        self._most_readings = settings.probe_readings
        # A probe is never larger than a step.
        fitting = settings.step_token_budget // max(1, self._tokens)
        self._prompts = min(settings.probe_prompts, fitting)
        self._most_kept = settings.max_running
        # Enough for a probe while as many as possible are kept.
        self._slots = range(self._prompts + self._most_kept)
        self._block_tokens = settings.block_tokens
        self._slot_blocks = -(-self._tokens // self._block_tokens)
        self._waiting: deque[Sequence] = deque()
        # By the id of the weights.
        self._caches: dict[str, KVCache] = {}
        # What sequences keep, and the cache that has its KV. A slot is free once no sequence keeps it.
        self._kept: WeakKeyDictionary[ProbedLayers, KVCache] = WeakKeyDictionary()

    @property
    def is_waiting(self) -> bool:
        """Whether sequences wait for a plan."""
        return bool(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that has a route. It is in the scheduler's queue as well."""
        self._waiting.append(sequence)

    def route(
        self, plans: Seq[Plan], in_force: Container[ServedPlan]
    ) -> list[tuple[Sequence, Exception | None]]:
        """Probes the next sequences and gives each the plan that its route chooses.

        A route whose `first` model is loaded is called after this model was probed. If it chooses none, it is
        called again with the readings of all models, and at last with those of all positions.
        plans: one for each loaded model; in_force: the plans that may be chosen. Returns these sequences,
        those that get no plan with the reason: PlanNotServedError, SequenceFailedError if a route chooses
        none from all readings, or whatever the route raised.
        """
        models = {plan.entry.name: plan for plan in plans}
        beginnings = self._beginnings(plans)
        # Only the loaded models keep their caches.
        self._caches = {plan.model.weights.id: self._cache_of(plan) for plan in plans}
        for name, plan in models.items():
            self._probe(plan, [one for one in beginnings if _first_of(one, models) in (name, None)])
        undecided = [one for one in beginnings if not self._choose(one, models, in_force)]
        for name, plan in models.items():
            self._probe(plan, [one for one in undecided if name not in one.states])
        undecided = [one for one in undecided if not self._choose(one, models, in_force)]
        for one in undecided:
            one.read(len(one.ids))
        # Few prompts come here, so what was computed of them is computed again.
        for plan in plans:
            self._probe(plan, undecided)
        for one in undecided:
            self._choose(one, models, in_force)
        return [(one.seq, one.error) for one in beginnings]

    def go_on(
        self,
        plan: Plan,
        scheduled: list[tuple[Sequence, int]],
        cache: KVCache,
        advance: Callable[[Sequence, int], None],
    ) -> list[tuple[Sequence, int]]:
        """Takes what was kept of the scheduled sequences through the remaining layers of their plans.

        With fewer than `LEAST_ROWS` per thread it does nothing, and they are computed again.
        scheduled: (sequence, tokens to compute) pairs of one model; cache: the KV of all sequences; advance:
        notes that a sequence's next tokens are computed. Returns the pairs with the tokens that are left, at
        least one of each sequence.
        """
        if not self._kept:
            return scheduled
        going: list[tuple[Sequence, int, ProbedLayers]] = []
        left: list[tuple[Sequence, int]] = []
        for seq, count in scheduled:
            kept, seq.probed, tokens = seq.probed, None, 0
            # A shared prefix has more layers, and other weights have other states.
            if kept is not None and not seq.computed and kept.weights_id == plan.model.weights.id:
                tokens = min(len(kept.states), count - 1)
                if tokens:
                    going.append((seq, tokens, kept))
            left.append((seq, count - tokens))
        if not going or sum(tokens for _, tokens, _ in going) < LEAST_ROWS * TEAM.threads:
            return scheduled
        self._run_remaining(plan.model, going, cache)
        for seq, tokens, _ in going:
            advance(seq, tokens)
        return left

    def _beginnings(self, plans: Seq[Plan]) -> list[_Beginning]:
        """Takes the next sequences, and chooses what is probed and what is read out."""
        sequences: list[Sequence] = []
        while self._waiting and len(sequences) < self._prompts:
            seq = self._waiting.popleft()
            # It may have been cancelled meanwhile.
            if seq.state is SequenceState.WAITING:
                sequences.append(seq)
        configs = [plan.model.config for plan in plans]
        most = min(self._tokens, *(config.context_tokens for config in configs))
        vocabulary = min(config.vocab_size for config in configs)
        taken = {kept.slot for kept in self._kept}
        free = (slot for slot in self._slots if slot not in taken)
        beginnings: list[_Beginning] = []
        for seq in sequences:
            # The last token of a prompt has no next one.
            count = min(most, seq.prompt_tokens - 1)
            ids = tuple(seq.token_ids[: count + 1])
            if count < self._least_tokens or max(ids) >= vocabulary:
                beginnings.append(_Beginning(seq, ids[:most]))
                continue
            beginnings.append(_Beginning(seq, ids[:count], slot=next(free)))
            beginnings[-1].read(self._most_readings)
        return beginnings

    def _probe(self, plan: Plan, beginnings: Seq[_Beginning]) -> None:
        """Runs a model up to its first exit, and reads it out there."""
        probed = [one for one in beginnings if one.is_probed]
        if not probed:
            return
        read_rows, targets, texts, rows = list[int](), list[int](), list[_Text](), 0
        for one in probed:
            read_rows += [rows + position for position in one.positions]
            targets += one.targets
            first = one.slot * self._slot_blocks
            texts.append((one.ids, range(first, first + self._blocks_for(len(one.ids)))))
            rows += len(one.ids)
        name, depth = plan.entry.name, plan.entry.exit_layers[0]
        batch = _batch_of(texts, read_rows, self._block_tokens, plan.model.device)
        cache = self._caches[plan.model.weights.id]
        found, states = plan.model.backend.step_with_states(batch, cache, depth)
        nats, doubts = found.costs(targets)
        # The model's next step overwrites them.
        states, row, read = states.clone(), 0, 0
        for one in probed:
            count = len(one.positions)
            means = fmean(nats[read : read + count]), fmean(doubts[read : read + count])
            one.states[name] = states[row : row + len(one.ids)]
            # Numbers that are too large for the precision say nothing about the text.
            if all(map(math.isfinite, means)):
                one.readings = {**one.readings, name: ExitReading(depth, count, *means)}
            row, read = row + len(one.ids), read + count

    def _choose(self, one: _Beginning, models: Mapping[str, Plan], in_force: Container[ServedPlan]) -> bool:
        """Lets a route choose the plan of its sequence. Returns False if it needs the other readings."""
        seq = one.seq
        is_complete = not one.is_probed or (len(one.states) == len(models) and not one.is_sample)
        assert seq.route is not None
        probe = Probe(seq.prompt_tokens, one.readings, one.ids)
        try:
            chosen = seq.route(probe, is_complete=is_complete)
            if chosen is None:
                if not is_complete:
                    return False
                raise SequenceFailedError("the route chose no plan from all readings")
            if chosen not in in_force:
                raise PlanNotServedError(f"{chosen} is not in force here; another worker may serve it")
        except Exception as error:
            one.error = error
            return True
        seq.change_plan(chosen)
        seq.route, seq.probe = None, probe
        if one.is_probed:
            seq.probed_tokens = len(one.ids)
        if chosen.model in one.states and len(self._kept) < self._most_kept:
            plan = models[chosen.model]
            weights_id, layers = plan.model.weights.id, plan.entry.exit_layers[0]
            seq.probed = ProbedLayers(weights_id, layers, one.states[chosen.model], one.slot)
            self._kept[seq.probed] = self._caches[weights_id]
        return True

    def _cache_of(self, plan: Plan) -> KVCache:
        model = plan.model
        if (cache := self._caches.get(model.weights.id)) is not None:
            return cache
        return KVCache.of(
            model.config,
            plan.entry.exit_layers[0],
            len(self._slots) * self._slot_blocks,
            self._block_tokens,
            model.kv_dtype,
            model.device,
            # Most slots are rarely used.
            commit=False,
        )

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _run_remaining(
        self, model: Model, going: list[tuple[Sequence, int, ProbedLayers]], cache: KVCache
    ) -> None:
        """Fills the sequences' blocks up to their depths."""
        # Deepest first, so that those which go on after a depth are always the first rows.
        going = sorted(going, key=lambda one: -one[0].plan.depth)
        for seq, tokens, kept in going:
            blocks = seq.blocks[: self._blocks_for(tokens)]
            cache.fill(blocks, self._kept[kept], kept.slot * self._slot_blocks)
        hidden, first = torch.cat([kept.states[:tokens] for _, tokens, kept in going]), going[0][2].layers
        while going:
            last = going[-1][0].plan.depth
            if last > first:
                texts = [
                    (seq.token_ids[:tokens], seq.blocks[: self._blocks_for(tokens)])
                    for seq, tokens, _ in going
                ]
                batch = _batch_of(texts, [], self._block_tokens, model.device)
                hidden = model.layers(first, last, hidden[: batch.rows], batch, cache)
            first = last
            going = [one for one in going if one[0].plan.depth > last]


def _first_of(one: _Beginning, models: Container[str]) -> str | None:
    """The model that is probed first. None: all at once."""
    first = None if one.seq.route is None else one.seq.route.first(one.ids)
    return first if first in models else None


def _batch_of(texts: Seq[_Text], read_rows: list[int], block_tokens: int, device: torch.device) -> Batch:
    """The batch of the beginnings of several texts."""
    token_ids, positions, slots, row_tables = list[int](), list[int](), list[int](), list[int]()
    chunks: list[tuple[int, int, bool]] = []
    tables: list[int] = []
    width = max(len(blocks) for _, blocks in texts)
    for index, (ids, blocks) in enumerate(texts):
        start, end = len(token_ids), len(token_ids) + len(ids)
        chunks.append((start, end, True))
        token_ids += ids
        positions += range(len(ids))
        for block in blocks:
            slots += range(block * block_tokens, (block + 1) * block_tokens)
        # The last block may not be full.
        del slots[end:]
        row_tables += [index] * len(ids)
        tables += blocks
        tables += [0] * (width - len(blocks))
    numbers = array("q", token_ids + positions + slots + row_tables + read_rows + tables)
    sizes = len(token_ids), len(read_rows), len(texts)
    return Batch(numbers, device, *sizes, 0, block_tokens, tuple(chunks))
