"""Probes prompts before they have a plan, and lets their routes choose one.

The first tokens of a prompt go through the first layers of every loaded model, and a sample of them is read
out at the first exit: how well does the model predict the prompt's own next tokens? What the chosen model has
computed is kept, and prefill goes on with it.
"""

import math
from array import array
from collections import deque
from collections.abc import Callable, Container, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.model import Model
from helios.engine.backends.readout import Readout
from helios.engine.plan import Plan
from helios.engine.scheduling.batch import Batch
from helios.engine.scheduling.probed_layers import ProbedLayers
from helios.engine.scheduling.sequence import Sequence, SequenceState
from helios.engine.settings import EngineSettings
from helios.errors import PlanNotServedError
from helios.routing.probe import ExitReading, Probe
from helios.served import ServedPlan


class _Part(NamedTuple):
    """One prompt's part of a probe: its rows, its rows of the readout, and the slot of its KV."""

    rows: slice
    reads: slice
    slot: int


class _Beginnings(NamedTuple):
    """The first tokens of several prompts as one batch, which every model computes."""

    # None: no prompt is probed.
    batch: Batch | None
    # The prompts' own next tokens, for each row that is read.
    targets: list[int]
    # None: the prompt is not probed.
    parts: list[_Part | None]


class _Computed(NamedTuple):
    """What one model computed of `_Beginnings`. Valid until its next step."""

    weights_id: str
    depth: int
    readout: Readout
    states: torch.Tensor
    cache: KVCache


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

        plans: one for each loaded model; in_force: the plans that may be chosen. Returns these sequences,
        those that get no plan with the reason: PlanNotServedError, or whatever the route raised.
        """
        sequences: list[Sequence] = []
        while self._waiting and len(sequences) < self._prompts:
            seq = self._waiting.popleft()
            # It may have been cancelled meanwhile.
            if seq.state is SequenceState.WAITING:
                sequences.append(seq)
        beginnings = self._beginnings(plans, sequences)
        found = self._compute(plans, beginnings.batch) if beginnings.batch is not None else {}
        readings = _readings(found, beginnings)
        routed: list[tuple[Sequence, Exception | None]] = []
        for seq, part, of_prompt in zip(sequences, beginnings.parts, readings, strict=True):
            assert seq.route is not None
            probe = Probe(seq.prompt_tokens, of_prompt)
            try:
                chosen = seq.route(probe)
                if chosen not in in_force:
                    raise PlanNotServedError(f"{chosen} is not in force here; another worker may serve it")
            except Exception as error:
                routed.append((seq, error))
                continue
            seq.change_plan(chosen)
            seq.route, seq.probe = None, probe
            if part is not None:
                seq.probed_tokens = part.rows.stop - part.rows.start
                if (computed := found.get(chosen.model)) is not None:
                    self._keep(seq, part, computed)
            routed.append((seq, None))
        return routed

    def go_on(
        self,
        plan: Plan,
        scheduled: list[tuple[Sequence, int]],
        cache: KVCache,
        advance: Callable[[Sequence, int], None],
    ) -> list[tuple[Sequence, int]]:
        """Takes what was kept of the scheduled sequences through the remaining layers of their plans.

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
        if going:
            self._run_remaining(plan.model, going, cache)
        for seq, tokens, _ in going:
            advance(seq, tokens)
        return left

    def _beginnings(self, plans: Seq[Plan], sequences: Seq[Sequence]) -> _Beginnings:
        """Chooses what is probed and what is read out."""
        configs = [plan.model.config for plan in plans]
        most = min(self._tokens, *(config.context_tokens for config in configs))
        vocabulary = min(config.vocab_size for config in configs)
        taken = {kept.slot for kept in self._kept}
        free = (slot for slot in self._slots if slot not in taken)
        texts: list[tuple[list[int], Seq[int]]] = []
        parts: list[_Part | None] = []
        read_rows, targets, rows = list[int](), list[int](), 0
        for seq in sequences:
            # The last token of a prompt has no next one.
            count = min(most, seq.prompt_tokens - 1)
            ids = seq.token_ids[: count + 1]
            if count < self._least_tokens or max(ids) >= vocabulary:
                parts.append(None)
                continue
            readings, first_read = min(self._most_readings, count), len(targets)
            at = [(2 * index + 1) * count // (2 * readings) for index in range(readings)]
            read_rows += (rows + position for position in at)
            targets += (ids[position + 1] for position in at)
            slot = next(free)
            parts.append(_Part(slice(rows, rows + count), slice(first_read, len(targets)), slot))
            first = slot * self._slot_blocks
            texts.append((ids[:count], range(first, first + self._blocks_for(count))))
            rows += count
        batch = None
        if texts:
            batch = _batch_of(texts, read_rows, self._block_tokens, plans[0].model.device)
        return _Beginnings(batch, targets, parts)

    def _compute(self, plans: Seq[Plan], batch: Batch) -> dict[str, _Computed]:
        """Runs every model up to its first exit. By model."""
        # Only the loaded models keep their caches.
        self._caches = {plan.model.weights.id: self._cache_of(plan) for plan in plans}
        found: dict[str, _Computed] = {}
        for plan in plans:
            weights_id, depth = plan.model.weights.id, plan.entry.exit_layers[0]
            cache = self._caches[weights_id]
            results = plan.model.backend.step_with_states(batch, cache, depth)
            found[plan.entry.name] = _Computed(weights_id, depth, *results, cache)
        return found

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

    def _keep(self, seq: Sequence, part: _Part, computed: _Computed) -> None:
        """Keeps a prompt's part, with a copy of its states, because the model's next step overwrites them."""
        if len(self._kept) < self._most_kept:
            states = computed.states[part.rows].clone()
            seq.probed = ProbedLayers(computed.weights_id, computed.depth, states, part.slot)
            self._kept[seq.probed] = computed.cache

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


def _readings(found: Mapping[str, _Computed], beginnings: _Beginnings) -> list[dict[str, ExitReading]]:
    """Each prompt's readings, by model."""
    readings: list[dict[str, ExitReading]] = [{} for _ in beginnings.parts]
    for name, computed in found.items():
        nats, doubts = computed.readout.costs(beginnings.targets)
        for of_prompt, part in zip(readings, beginnings.parts, strict=True):
            if part is None:
                continue
            count = part.reads.stop - part.reads.start
            means = sum(nats[part.reads]) / count, sum(doubts[part.reads]) / count
            # Numbers that are too large for the precision say nothing about the text.
            if all(map(math.isfinite, means)):
                of_prompt[name] = ExitReading(computed.depth, count, *means)
    return readings


def _batch_of(
    texts: Seq[tuple[list[int], Seq[int]]], read_rows: list[int], block_tokens: int, device: torch.device
) -> Batch:
    """The batch of the beginnings of several texts. texts: token ids and their blocks."""
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
