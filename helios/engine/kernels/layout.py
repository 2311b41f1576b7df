"""Names for everything that crosses the border between Python and compiled code.

Data that is made once, when a model is loaded, is in NumPy records (`MODEL`, `LAYER` and their parts). Data
of each call is in named tuples, which cross as plain tuples (`border`). Compiled code reads the fields of
both by name. Addresses are integers and are not checked: the caller keeps their memory alive.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Precisions of products. Embedding tables use one of the first two, or float16.
FLOAT32, BFLOAT16, INT8, FLOAT16 = 0, 1, 2, 3
# Activations that a product applies to its results. GATE: the result has one number for two channels, 16
# channels apart: silu(first) * second (SwiGLU, Shazeer 2020).
NONE, RELU, GATE = 0, 1, 2
# Kinds of norms.
LAYER_NORM, RMS_NORM = 0, 1

# Columns of a row's summary: its largest logit, the log of the sum of all exponentials, then the
# log-probability and the probability of the most likely token.
PEAK, NORMALIZER, LOGPROB, CONFIDENCE = 0, 1, 2, 3
SUMMARY = 4

# A norm's parameters, float32 [width] each. Weight 0 means that there is no norm. An RMS norm has no bias.
NORM = np.dtype([("weight", np.int64), ("bias", np.int64)], align=True)

# A packed linear layer (`linear.pack`): its sizes and the addresses of its tensors. Only int8 uses
# weight_sums and scales. Weights 0 means that there is no such layer.
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

# One decoder layer. Its fields are those of `packed_weights.Layer`.
LAYER = np.dtype(
    [
        ("attn_norm", NORM),
        ("qkv", LINEAR),
        ("q_norm", NORM),
        ("k_norm", NORM),
        ("out", LINEAR),
        ("ffn_norm", NORM),
        ("fc1", LINEAR),
        ("fc2", LINEAR),
    ],
    align=True,
)

# Token embeddings of `width` numbers each. The table may be a packed LM head, so it has the same layout:
# tiles of `tile_tokens` tokens and `tile_numbers` numbers, with `word_numbers` of one token side by side.
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

# Learned positions: a table of rows of the model's width. Position p uses row p + offset. Table 0 means that
# positions are not learned.
POSITIONS = np.dtype([("table", np.int64), ("precision", np.int64), ("offset", np.int64)], align=True)

# An architecture's sizes and choices, and the parts that a model has at every depth.
MODEL = np.dtype(
    [
        # Precision of all products.
        ("precision", np.int64),
        # Width of a row's state, of its queries, keys and values together, and of the space between fc1 and
        # fc2.
        ("width", np.int64),
        ("qkv_width", np.int64),
        ("ffn_width", np.int64),
        ("heads", np.int64),
        ("kv_heads", np.int64),
        ("head_dim", np.int64),
        ("vocabulary", np.int64),
        # Kind of all norms, and whether they come before each block, or after it.
        ("norm", np.int64),
        ("norm_before", np.bool_),
        ("epsilon", np.float32),
        # Cosines, then sines, of rotary positions: float32 [context, head_dim]. 0: positions are not rotary.
        ("rotation", np.int64),
        # Activation between fc1 and fc2.
        ("activation", np.int64),
        ("embedding", EMBEDDING),
        ("positions", POSITIONS),
        ("project_in", LINEAR),
        ("project_out", LINEAR),
        ("lm_head", LINEAR),
    ],
    align=True,
)

# One exit of a step: its number of layers, and its own head before the LM head. The other fields say which
# rows leave there. If that is known before the step, all rows but the first `staying` leave. In a dynamic
# step, decode rows leave that reach the confidence `threshold`.
EXIT = np.dtype(
    [
        ("layer", np.int64),
        ("staying", np.int64),
        ("threshold", np.float32),
        ("norm", NORM),
        ("linear", LINEAR),
    ],
    align=True,
)

# How a row's token is chosen. top_k 0: among all tokens; temperature 0: the most likely one. history_end: end
# of the row's ids in `Draws.history`. They begin at the end of the previous row's ids.
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
    """Makes a record of `kind`, in an array of one. Fields that are not given are zero."""
    made = np.zeros(1, dtype=kind)
    for name, value in fields.items():
        made[name] = value
    return made


class Thread(NamedTuple):
    """One of the threads that compute a call together."""

    number: int
    threads: int
    # Address of the barrier: int64 [2], zero at first. Not used by a single thread.
    barrier: int


ALONE = Thread(0, 1, 0)


class BatchAddresses(NamedTuple):
    """A step's rows (`Batch`). All data at these addresses is int64."""

    rows: int
    # Number of rows that decode. Used only by dynamic steps, in which they come first.
    decode_rows: int
    reads: int
    # Per row, [rows]: its token, its position, the slot of its keys and values, and the index of its
    # sequence's table.
    token_ids: int
    positions: int
    slots: int
    row_tables: int
    # Rows from which a token is read, [reads].
    read_rows: int
    # Block numbers, [tables, table_blocks].
    tables: int
    table_blocks: int

    @classmethod
    def at(cls, address: int, rows: int, decode_rows: int, reads: int, table_blocks: int) -> "BatchAddresses":
        """The addresses of a batch whose parts lie one after the other, in the order of the fields."""
        row = 8 * rows
        read_rows = address + 4 * row
        per_row = address, address + row, address + 2 * row, address + 3 * row
        return cls(rows, decode_rows, reads, *per_row, read_rows, read_rows + 8 * reads, table_blocks)


class CacheAddresses(NamedTuple):
    """The keys and values of all layers (`KVCache`): one address per layer, uint64 if they are float16."""

    keys: NDArray[Any]
    values: NDArray[Any]
    block_tokens: int


class Attention(NamedTuple):
    """The attention of one layer: its heads, and where its KV lies, as in `CacheAddresses`.

    Each KV head serves a group of neighbouring query heads.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    keys: int | np.unsignedinteger[Any] | np.signedinteger[Any]
    values: int | np.unsignedinteger[Any] | np.signedinteger[Any]
    # What queries and keys go through before they meet: the weights of their norms, float32 [head_dim], and
    # `MODEL.rotation`. 0: nothing.
    q_norm: int
    k_norm: int
    epsilon: np.float32
    rotation: int


class Draws(NamedTuple):
    """How the tokens of the read rows are chosen. Without rows, each token is the most likely one."""

    # DRAW [reads]
    rows: NDArray[np.void]
    # The ids before each row that has a penalty, one row after the other: int64.
    history: NDArray[np.int64]


class Stop(NamedTuple):
    """Ends a burst before all its steps are taken."""

    # Address of int64 [2]: whether to stop, and the number of steps taken by then. 0: nobody can ask.
    interrupt: int
    # Tokens that end each row and so the burst: int64 [reads, any]. -1 is padding. May have no rows.
    last_tokens: NDArray[np.int64]


class Outputs(NamedTuple):
    """Addresses of the results for each row that is read."""

    # float32 [reads, vocabulary]
    logits: int
    # The most likely token, or the one that was drawn: int64 [reads].
    best: int
    # float32 [reads, SUMMARY]
    summaries: int
    # int64 [reads]
    exit_layers: int


class Room(NamedTuple):
    """Addresses of a step's work space and results."""

    # Has `step_scratch` bytes.
    scratch: int
    # Has `drawing_numbers` float32 for each thread. Used only by draws.
    drawing: int
    # `Outputs` of the rows that have not left yet. Used only by dynamic steps with several exits.
    found: tuple[int, ...]
    # `Outputs` of the step.
    out: tuple[int, ...]
