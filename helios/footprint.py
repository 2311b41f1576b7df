"""Bytes that a model takes: weights, keys and values, activations. Computed from its config; free of torch.

Profiler, controller and engine ask here whether a model fits, so that they agree near a budget.
"""

from collections.abc import Mapping

from helios.architectures.spec import ModelConfig
from helios.catalog import ModelEntry
from helios.modes import Precision

# Of one number of a product's weights, and of a key or value beside it. A precision that is not known counts
# as the widest: a newer worker may have one.
_ITEM_BYTES: Mapping[str, int] = {
    Precision.FLOAT32: 4,
    Precision.BFLOAT16: 2,
    Precision.FLOAT16: 2,
    Precision.INT8: 1,
}
_WIDEST_BYTES = 4
# Of norms and of what products add for each output channel: a bias; in int8 also a scale and a sum.
_FLOAT32_BYTES = 4
_INT8_CHANNEL_BYTES = 3 * _FLOAT32_BYTES
# Tables that are looked up stay in float16 in int8.
_INT8_TABLE_BYTES = 2


def weight_bytes(config: ModelConfig, precision: str, depth: int | None = None) -> int:
    """Of the first `depth` layers (None: all), the embeddings and the LM head, as they are loaded.

    Padding to whole tiles and the heads of exits are left out. precision: what products are computed in; a
    concrete one, not `auto`.
    """
    layers = config.num_layers if depth is None else depth
    tables = config.position_rows * config.hidden_size
    if precision == Precision.INT8 or not config.tied_head:
        # Or else embeddings are the LM head's own rows.
        tables += config.vocab_size * config.embed_size
    table_bytes = _INT8_TABLE_BYTES if precision == Precision.INT8 else item_bytes(precision)
    norms = 2 * layers + config.has_final_norm
    head = (config.vocab_size, config.embed_size)
    return (
        tables * table_bytes
        + norms * config.norm_parameters * _FLOAT32_BYTES
        + _product_bytes((head, *config.projections), precision)
        + layers * _product_bytes(config.layer_products, precision)
    )


def model_bytes(entry: ModelEntry, precision: str) -> int:
    """The weights of a model that is loaded whole, with the head of every exit."""
    config, facts = entry.config, entry.facts
    heads = sum(facts.has_own_head(layer) for layer in facts.exit_layers)
    norm = config.hidden_size * (2 if config.norm == "layer" else 1) * _FLOAT32_BYTES
    linear = (config.hidden_size, config.hidden_size)
    own = norm + _product_bytes((linear,) if facts.exit_head == "linear" else (), precision)
    return weight_bytes(config, precision) + heads * own


def kv_bytes_per_token(config: ModelConfig, depth: int, precision: str) -> int:
    """Of the keys and values of one token in the first `depth` layers, beside products in `precision`.

    In int8 each key and each value of a head has a scale. Padding to whole registers is left out.
    """
    scales = 2 * depth * config.num_kv_heads if precision == Precision.INT8 else 0
    return config.kv_numbers(depth) * item_bytes(precision) + scales * _FLOAT32_BYTES


def activation_bytes(config: ModelConfig, itemsize: int, step_tokens: int, sequences: int) -> int:
    """At the widest moment of a step of so many tokens and sequences: states, the fused projections or the
    feed-forward, and logits in float32. itemsize: of an activation, bytes."""
    widest = 4 * config.hidden_size + max(channels for channels, _ in config.layer_products)
    return step_tokens * widest * itemsize + 3 * sequences * config.vocab_size * _FLOAT32_BYTES


def item_bytes(precision: str) -> int:
    """Of one number of a product's weights in `precision`, and of a key or value beside it."""
    return _ITEM_BYTES.get(precision, _WIDEST_BYTES)


def _product_bytes(shapes: tuple[tuple[int, int], ...], precision: str) -> int:
    """shapes: [out, in] of matrices that inputs are multiplied by."""
    channel_bytes = _INT8_CHANNEL_BYTES if precision == Precision.INT8 else _FLOAT32_BYTES
    return sum(
        out_size * in_size * item_bytes(precision) + out_size * channel_bytes for out_size, in_size in shapes
    )
