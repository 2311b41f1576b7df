"""What crosses the border between Python and compiled code, by name.

What is made once, when a model is loaded, are NumPy records (`MODEL`, `LAYER` and their parts). What each
call brings are named tuples, which cross as plain ones (`border`). Compiled code reads the fields of both by
their names. Addresses are integers, unchecked: the caller keeps alive what lies there.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Precisions of products. Tables of embeddings are in one of the first two, or in float16.
FLOAT32, BFLOAT16, INT8, FLOAT16 = 0, 1, 2, 3
# Activations that a product applies to its results.
NONE, RELU = 0, 1

# Columns of a row's summary: its largest logit, the log of the sum of all exponentials, and of the most
# likely token the log-probability and the probability.
PEAK, NORMALIZER, LOGPROB, CONFIDENCE = 0, 1, 2, 3
SUMMARY = 4

# A norm's parameters, float32 [width] each. Weight 0: there is no norm.
NORM = np.dtype([("weight", np.int64), ("bias", np.int64)], align=True)

# A packed linear layer (`linear.pack`): its sizes and the addresses of its tensors. Only int8 has weight_sums
# and scales. Weights 0: there is no such layer.
LINEAR = np.dtype(
    [
        ("inputs", np.int64),
        ("channels", np.int64),
        ("weights", np.int64),
        ("biases", np.int64),
        ("weight_sums", np.int64),
        ("scales", np.int64),
    ],
    align=True,
)

# One decoder layer. The fields are those of `packed_weights.Layer`.
LAYER = np.dtype(
    [
        ("attn_norm", NORM),
        ("qkv", LINEAR),
        ("out", LINEAR),
        ("ffn_norm", NORM),
        ("fc1", LINEAR),
        ("fc2", LINEAR),
    ],
    align=True,
)

# Token embeddings, of `width` numbers each. They may be the rows of a packed LM head, so their numbers lie as
# there: in tiles of `tile_tokens` tokens and `tile_numbers` numbers, `word_numbers` of a token side by side.
EMBEDDING = np.dtype(
    [
        ("table", np.int64),
        ("precision", np.int64),
        ("width", np.int64),
        ("tile_tokens", np.int64),
        ("tile_numbers", np.int64),
        ("word_numbers", np.int64),
    ],
    align=True,
)

# Learned positions: a table of rows of the model's width. The row of position p is p + offset.
POSITIONS = np.dtype([("table", np.int64), ("precision", np.int64), ("offset", np.int64)], align=True)

# An architecture's sizes and choices, and what every depth of the model has.
MODEL = np.dtype(
    [
        # Of all products.
        ("precision", np.int64),
        # Numbers of a row's state, of its queries, keys and values together, and between fc1 and fc2.
        ("width", np.int64),
        ("qkv_width", np.int64),
        ("ffn_width", np.int64),
        ("heads", np.int64),
        ("kv_heads", np.int64),
        ("head_dim", np.int64),
        ("vocabulary", np.int64),
        # Before each block, or after it.
        ("norm_before", np.bool_),
        ("epsilon", np.float32),
        # Between fc1 and fc2.
        ("activation", np.int64),
        ("embedding", EMBEDDING),
        ("positions", POSITIONS),
        ("project_in", LINEAR),
        ("project_out", LINEAR),
        ("lm_head", LINEAR),
    ],
    align=True,
)

# An exit that a step may take: after how many layers, how confident a decode row must be to leave there, and
# what the exit has of its own before the LM head.
EXIT = np.dtype(
    [("layer", np.int64), ("threshold", np.float32), ("norm", NORM), ("linear", LINEAR)],
    align=True,
)

# How a row's token is chosen. top_k 0: among all tokens; temperature 0: the most likely one. history_end:
# where the row's ids end in `Draws.history`; they begin where those of the row before it end.
DRAW = np.dtype(
    [
        ("seed", np.uint64),
        ("position", np.int64),
        ("top_k", np.int64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("repetition_penalty", np.float64),
        ("history_end", np.int64),
    ],
    align=True,
)


def record(kind: np.dtype[np.void], **fields: Any) -> NDArray[np.void]:
    """A record of `kind`, in an array of one. Fields that are not given are zero."""
    made = np.zeros(1, dtype=kind)
    for name, value in fields.items():
        made[name] = value
    return made


class Thread(NamedTuple):
    """One of the threads that compute a call together."""

    number: int
    threads: int
    # Where they meet: the address of int64 [2], zero at first. One thread alone needs none.
    barrier: int


ALONE = Thread(0, 1, 0)


class BatchAddresses(NamedTuple):
    """A step's rows (`Batch`), decode rows first. All that lies at these addresses is int64."""

    rows: int
    decode_rows: int
    reads: int
    # Per row, [rows]: the token, its position, the slot of its keys and values, and which table is its
    # sequence's.
    token_ids: int
    positions: int
    slots: int
    row_tables: int
    # Rows that a token is read from, [reads].
    read_rows: int
    # Block numbers, [tables, table_blocks].
    tables: int
    table_blocks: int

    @classmethod
    def at(cls, address: int, rows: int, decode_rows: int, reads: int, table_blocks: int) -> "BatchAddresses":
        """Of a batch whose parts lie one after the other, in the order of the fields."""
        row = 8 * rows
        read_rows = address + 4 * row
        per_row = address, address + row, address + 2 * row, address + 3 * row
        return cls(rows, decode_rows, reads, *per_row, read_rows, read_rows + 8 * reads, table_blocks)


class CacheAddresses(NamedTuple):
    """The keys and values of all layers (`KVCache`): an address per layer, uint64 where they are float16."""

    keys: NDArray[Any]
    values: NDArray[Any]
    block_tokens: int


class Attention(NamedTuple):
    """The attention of one layer: its heads, and where its keys and values lie, as in `CacheAddresses`."""

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    keys: int | np.unsignedinteger[Any] | np.signedinteger[Any]
    values: int | np.unsignedinteger[Any] | np.signedinteger[Any]


class Draws(NamedTuple):
    """How the tokens of the rows that are read are chosen. No rows: each is the most likely one."""

    # DRAW [reads]
    rows: NDArray[np.void]
    # The ids before each row that has a penalty, one row after the other: int64.
    history: NDArray[np.int64]


class Stop(NamedTuple):
    """What ends a burst before all its steps are taken."""

    # Address of int64 [2]: whether to stop, and how many steps were taken then. 0: nobody asks.
    interrupt: int
    # Tokens that end each row, and the burst with it, -1: none; int64 [reads, any], or no rows.
    last_tokens: NDArray[np.int64]


class Outputs(NamedTuple):
    """Addresses of what a step computes for each row that is read."""

    # float32 [reads, vocabulary]
    logits: int
    # The most likely token, or the one that was drawn: int64 [reads].
    best: int
    # float32 [reads, SUMMARY]
    summaries: int
    # int64 [reads]
    exit_layers: int


class Room(NamedTuple):
    """Addresses of what a step works in and writes to."""

    # `step_scratch` bytes.
    scratch: int
    # `drawing_numbers` float32 for each thread. Used only by draws.
    drawing: int
    # `Outputs` of the rows that are still in the model. Used only where there are several exits.
    found: tuple[int, ...]
    # `Outputs` of the step.
    out: tuple[int, ...]
