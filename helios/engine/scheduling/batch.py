"""The tensors of one step: the rows of all its sequences, concatenated along one axis.

Rows of the deepest plan come first, so that those that go on after an exit are always the first ones. Among
rows of one depth, decode rows come before the chunks of prefills.
"""

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import torch

from helios.engine.scheduling.prompt_readings import PromptReadings
from helios.engine.scheduling.sequence import Sequence

# The depths of a step's rows, ascending, and for each the number of rows that are deeper. Those come first.
Depths = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Rows start..end of the batch: consecutive tokens of one sequence."""

    start: int
    end: int
    # Blocks of all the sequence's tokens up to the end of this chunk: [1, blocks].
    context_blocks: torch.Tensor
    # The slots of these blocks that each row may attend to, [rows, blocks * block_tokens]. None: the chunk is
    # the whole context, with the usual causal mask.
    mask: torch.Tensor | None


# Not frozen: one is created per step, and freezing makes creation twice as slow.
@dataclass(eq=False)
class Batch:
    """One step: T rows of S sequences."""

    # All integers of the step, one after the other: token ids, positions, slots and row_tables, [T] each;
    # read_rows, [R]; tables, [S, W]. 64 bits each, created in host memory.
    values: "torch.Tensor | array[int]"
    device: torch.device
    rows: int
    reads: int
    sequences: int
    # Number of rows that are one token of a decoding sequence each. With one depth they are the first rows.
    decode_rows: int
    block_tokens: int
    # (start, end, whole) of each prefill: its rows, and whether they are its whole context.
    chunks: tuple[tuple[int, int, bool], ...]
    # Empty if the depth, the same for all rows, is given beside the batch.
    depths: Depths = ()

    @classmethod
    def of(
        cls,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        tables: torch.Tensor,
        row_tables: torch.Tensor,
        decode_rows: int,
        block_tokens: int,
        chunks: tuple[tuple[int, int, bool], ...],
        read_rows: torch.Tensor,
    ) -> "Batch":
        """A batch from its parts, which are all int64."""
        numbers = torch.cat([token_ids, positions, slots, row_tables, read_rows, tables.flatten()])
        sizes = len(token_ids), len(read_rows), len(tables)
        return cls(numbers, numbers.device, *sizes, decode_rows, block_tokens, chunks)

    @cached_property
    def numbers(self) -> torch.Tensor:
        """`values` on the device, copied in one transfer. Compiled code reads `addresses` instead."""
        if isinstance(self.values, torch.Tensor):
            return self.values
        return torch.frombuffer(self.values, dtype=torch.int64).to(self.device)

    @property
    def depth(self) -> int:
        """The depth of all rows. Raises ValueError if they have several."""
        ((depth, _),) = self.depths
        return depth

    @property
    def width(self) -> int:
        """Number of blocks of the longest context."""
        return (len(self.values) - 4 * self.rows - self.reads) // self.sequences

    @property
    def token_ids(self) -> torch.Tensor:
        """Token id of each row: [T]."""
        return self._parts[0]

    @property
    def positions(self) -> torch.Tensor:
        """Position of each row, from 0: the number of tokens before it. [T]"""
        return self._parts[1]

    @property
    def slots(self) -> torch.Tensor:
        """Slot to which each row's keys and values are written: [T]."""
        return self._parts[2]

    @property
    def row_tables(self) -> torch.Tensor:
        """Index of each row's sequence in `tables`: [T]."""
        return self._parts[3]

    @property
    def read_rows(self) -> torch.Tensor:
        """Rows from which a token is read, in the order of their sequences: [R]."""
        return self._parts[4]

    @property
    def tables(self) -> torch.Tensor:
        """The sequences' block numbers: [S, W]."""
        return self._parts[5].view(self.sequences, -1)

    @cached_property
    def _parts(self) -> tuple[torch.Tensor, ...]:
        rows, reads = self.rows, self.reads
        sizes = [rows, rows, rows, rows, reads, len(self.values) - 4 * rows - reads]
        return torch.split(self.numbers, sizes)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Number of tokens that each row sees, including itself: [T]."""
        return self.positions + 1

    @property
    def address(self) -> int:
        """Address of `values`, for compiled code."""
        values = self.values
        return values.data_ptr() if isinstance(values, torch.Tensor) else values.buffer_info()[0]

    @cached_property
    def decode_mask(self) -> torch.Tensor:
        """True where a decode row may attend: [decode_rows, 1, 1, blocks * block_tokens]. For one depth."""
        lengths = self.lengths[: self.decode_rows, None]
        return self._slots_seen < lengths[:, None, None]

    @cached_property
    def decode_blocks(self) -> torch.Tensor:
        """Blocks of each decode row's sequence: [decode_rows, blocks]. For one depth."""
        return self.tables[self.row_tables[: self.decode_rows]]

    @cached_property
    def prefills(self) -> tuple[PrefillChunk, ...]:
        """The prefill chunks, with blocks and masks for attention."""
        found = []
        for start, end, whole in self.chunks:
            table = self.tables[self.row_tables[start : start + 1]]
            blocks = -(-int(self.lengths[end - 1]) // self.block_tokens)
            mask = None
            if not whole:
                seen = self._slots_seen[: blocks * self.block_tokens]
                mask = seen < self.lengths[start:end, None]
            found.append(PrefillChunk(start, end, table[:, :blocks], mask))
        return tuple(found)

    @cached_property
    def _slots_seen(self) -> torch.Tensor:
        return torch.arange(self.tables.shape[1] * self.block_tokens, device=self.tables.device)

    def with_decode_rows(self, rows: torch.Tensor) -> "Batch":
        """This batch with only some of its decode rows. Prefill rows stay. For one depth.

        rows: [kept], ascending.
        """
        prefill_rows = torch.arange(self.decode_rows, len(self.token_ids), device=rows.device)
        kept = torch.cat([rows, prefill_rows])
        shift = self.decode_rows - len(rows)
        return Batch.of(
            self.token_ids[kept],
            self.positions[kept],
            self.slots[kept],
            self.tables,
            self.row_tables[kept],
            len(rows),
            self.block_tokens,
            tuple((start - shift, end - shift, whole) for start, end, whole in self.chunks),
            self.read_rows,
        )


def build_batch(
    scheduled: Seq[tuple[Sequence, int]],
    block_tokens: int,
    device: torch.device,
    readings: PromptReadings | None = None,
) -> tuple[Batch, list[Sequence]]:
    """Builds the batch of scheduled (sequence, tokens) pairs. Also returns the sequences that get a token.

    A sequence gets a token when its last known token is among the rows. The rows of `readings` are read after
    those of the sequences; `readings` notes the token that follows each of them.
    """
    depth, several, decodes, prefills = scheduled[0][0].plan.depth, False, [], []
    for seq, count in scheduled:
        if seq.plan.depth != depth:
            several = True
        if seq.is_decoding:
            decodes.append(seq)
        else:
            prefills.append((seq, count))
    groups = _by_depth(decodes, prefills) if several else [(depth, decodes, prefills)]
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    row_tables: list[int] = []
    read_rows: list[int] = []
    tables: list[list[int]] = []
    readers: list[Sequence] = []
    chunks: list[tuple[int, int, bool]] = []
    depths: Depths = ()
    decode_rows = 0
    for depth, decodes, prefills in groups:
        depths = ((depth, len(token_ids)), *depths)
        decode_rows += len(decodes)
        row_tables += range(len(tables), len(tables) + len(decodes))
        read_rows += range(len(token_ids), len(token_ids) + len(decodes))
        # Each decode row is the last token of its sequence, and is read. One pass over the sequences, because
        # they are scattered in memory.
        for seq in decodes:
            position, blocks = seq.computed, seq.blocks
            token_ids.append(seq.token_ids[-1])
            positions.append(position)
            slots.append(blocks[position // block_tokens] * block_tokens + position % block_tokens)
            tables.append(blocks)
        readers += decodes
        for seq, count in prefills:
            start, end = seq.computed, seq.computed + count
            first_row = len(token_ids)
            chunks.append((first_row, first_row + count, start == 0))
            token_ids += seq.token_ids[start:end]
            positions += range(start, end)
            slots += (
                seq.blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(start, end)
            )
            row_tables += [len(tables)] * count
            tables.append(seq.blocks[: -(-end // block_tokens)])
            if count == seq.pending:
                read_rows.append(len(token_ids) - 1)
                readers.append(seq)
            if readings is not None:
                readings.take(seq, start, end, first_row)
    if readings is not None:
        read_rows += readings.rows
    rows, width = len(token_ids), max(map(len, tables))
    # One list for everything, so that it is converted only once.
    numbers = token_ids + positions + slots + row_tables + read_rows
    for table in tables:
        numbers += table
        numbers += [0] * (width - len(table))
    sizes = rows, len(read_rows), len(tables), decode_rows
    return Batch(array("q", numbers), device, *sizes, block_tokens, tuple(chunks), depths), readers


def _by_depth(
    decodes: Seq[Sequence], prefills: Seq[tuple[Sequence, int]]
) -> list[tuple[int, list[Sequence], list[tuple[Sequence, int]]]]:
    """The depth, decodes and prefills of each group of one depth, the deepest first."""
    depths = {seq.plan.depth for seq in (*decodes, *(seq for seq, _ in prefills))}
    return [
        (
            depth,
            [seq for seq in decodes if seq.plan.depth == depth],
            [one for one in prefills if one[0].plan.depth == depth],
        )
        for depth in sorted(depths, reverse=True)
    ]
