"""The tensors of one step: decode rows first, then the chunks of prefills, flattened to one axis."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from helios.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Rows start..end of the batch are consecutive tokens of one sequence."""

    start: int
    end: int
    # Blocks of all the sequence's tokens up to and with this chunk. [1, blocks]
    context_blocks: torch.Tensor
    # Which of their slots each row may see; None: the chunk is the whole context, plainly causal.
    # [rows, blocks * block_tokens]
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    """One step. T rows of S sequences; the first `decode_rows` are single tokens of as many sequences."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], from 0: a row sees this many tokens before itself
    slots: torch.Tensor  # [T], where each row's keys and values go
    tables: torch.Tensor  # [S, blocks of the longest context], the sequences' block numbers
    row_tables: torch.Tensor  # [T], the sequence of each row
    decode_rows: int
    block_tokens: int
    # Rows start..end of each prefill, and whether they are its whole context.
    chunks: tuple[tuple[int, int, bool], ...]
    # Rows that a token is read from, in the order of the sequences that get one.
    read_rows: torch.Tensor  # [R]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Tokens that each row sees, itself the last: [T]."""
        return self.positions + 1

    @cached_property
    def addresses(self) -> NDArray[np.int64]:
        """Where compiled code finds slots, tables (and their width), row_tables and lengths."""
        parts = (self.slots, self.tables, self.row_tables, self.lengths)
        slots, tables, row_tables, lengths = (tensor.data_ptr() for tensor in parts)
        return np.array([slots, tables, self.tables.shape[1], row_tables, lengths], dtype=np.int64)

    @cached_property
    def decode_mask(self) -> torch.Tensor:
        """True where a decode row may look: [decode_rows, 1, 1, blocks * block_tokens]."""
        lengths = self.lengths[: self.decode_rows, None]
        return self._slots_seen < lengths[:, None, None]

    @cached_property
    def decode_blocks(self) -> torch.Tensor:
        """Blocks of each decode row's sequence: [decode_rows, blocks]."""
        return self.tables[self.row_tables[: self.decode_rows]]

    @cached_property
    def prefills(self) -> tuple[PrefillChunk, ...]:
        """The chunks with what their attention needs."""
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
        """This batch with only some of its decode rows (prefills stay). rows: [kept], ascending."""
        prefill_rows = torch.arange(self.decode_rows, len(self.token_ids), device=rows.device)
        kept = torch.cat([rows, prefill_rows])
        shift = self.decode_rows - len(rows)
        return replace(
            self,
            token_ids=self.token_ids[kept],
            positions=self.positions[kept],
            slots=self.slots[kept],
            row_tables=self.row_tables[kept],
            decode_rows=len(rows),
            chunks=tuple((start - shift, end - shift, whole) for start, end, whole in self.chunks),
        )


def build_batch(
    scheduled: Seq[tuple[Sequence, int]], block_tokens: int, device: torch.device
) -> tuple[Batch, list[Sequence]]:
    """The batch of scheduled (sequence, tokens), and the sequences that get a token from it.

    A sequence gets a token when its last known token is among the rows.
    """
    decodes: list[Sequence] = []
    prefills: list[tuple[Sequence, int]] = []
    for seq, count in scheduled:
        if count == 1 and seq.pending == 1:
            decodes.append(seq)
        else:
            prefills.append((seq, count))
    # Each decode row is the last token of its sequence, and read.
    token_ids = [seq.token_ids[-1] for seq in decodes]
    positions = [seq.computed for seq in decodes]
    slots = [
        seq.blocks[position // block_tokens] * block_tokens + position % block_tokens
        for seq, position in zip(decodes, positions, strict=True)
    ]
    row_tables = list(range(len(decodes)))
    read_rows, readers = row_tables.copy(), decodes.copy()
    tables = [seq.blocks for seq in decodes]
    chunks: list[tuple[int, int, bool]] = []
    for seq, count in prefills:
        start, end = seq.computed, seq.computed + count
        chunks.append((len(token_ids), len(token_ids) + count, start == 0))
        token_ids += seq.token_ids[start:end]
        positions += range(start, end)
        slots += (seq.blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(start, end))
        row_tables += [len(tables)] * count
        tables.append(seq.blocks[: -(-end // block_tokens)])
        if count == seq.pending:
            read_rows.append(len(token_ids) - 1)
            readers.append(seq)
    width = max(map(len, tables))
    # One transfer for all that has a number a row.
    rows = _tensor([token_ids, positions, slots, row_tables], device)
    batch = Batch(
        token_ids=rows[0],
        positions=rows[1],
        slots=rows[2],
        row_tables=rows[3],
        tables=_tensor([table + [0] * (width - len(table)) for table in tables], device),
        decode_rows=len(decodes),
        block_tokens=block_tokens,
        chunks=tuple(chunks),
        read_rows=_tensor(read_rows, device),
    )
    return batch, readers


def _tensor(numbers: list[int] | list[list[int]], device: torch.device) -> torch.Tensor:
    """Of int64. By way of numpy, which takes lists several times as fast as torch does."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64)).to(device)
