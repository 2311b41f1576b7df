"""The context of each row of a batch: which tokens it sees, and in which blocks they lie."""

import numpy as np

from helios.engine.kernels.jit import compiled
from helios.engine.kernels.simd import load_long


@compiled
def context_tokens(batch, row):
    """Tokens that a row sees, itself the last."""
    return load_long(batch.positions, row) + 1


@compiled
def longest_context(batch):
    """Tokens that the row with the longest context sees."""
    longest = np.int64(0)
    for row in range(batch.rows):
        longest = max(longest, context_tokens(batch, row))
    return longest


@compiled
def block_table(batch, row):
    """Address of the block numbers of a row's sequence, int64."""
    return batch.tables + 8 * load_long(batch.row_tables, row) * batch.table_blocks


@compiled
def are_of_one_sequence(batch, row, last):
    """Whether the rows from `row` to `last` exist and are one sequence's, whose rows follow each other."""
    return last < batch.rows and load_long(batch.row_tables, row) == load_long(batch.row_tables, last)


@compiled
def first_block_after(batch, row):
    """The block that is read first for the next row, or once more for the last one."""
    return load_long(block_table(batch, min(row + 1, batch.rows - 1)), 0)
