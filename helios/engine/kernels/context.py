"""The context of each row of a batch: the tokens that it sees, and the blocks that hold them."""

import numpy as np

from helios.engine.kernels.jit import compiled
from helios.engine.kernels.simd import load_long


@compiled
def context_tokens(batch, row):
    """Number of tokens that a row sees, including itself."""
    return load_long(batch.positions, row) + 1


@compiled
def longest_context(batch):
    """Number of tokens that the row with the longest context sees."""
    longest = np.int64(0)
    for row in range(batch.rows):
        longest = max(longest, context_tokens(batch, row))
    return longest


@compiled
def block_table(batch, row):
    """Address of the int64 block numbers of a row's sequence."""
    return batch.tables + 8 * load_long(batch.row_tables, row) * batch.table_blocks


@compiled
def are_of_one_sequence(batch, row, last):
    """Whether the rows `row` to `last` all exist and are consecutive rows of one sequence."""
    return last < batch.rows and load_long(batch.row_tables, row) == load_long(batch.row_tables, last)


@compiled
def first_block_after(batch, row):
    """The first block that the next row reads. After the last row, the first block of that row again."""
    return load_long(block_table(batch, min(row + 1, batch.rows - 1)), 0)
