"""Computes from a config how many bytes a model needs for weights, KV and activations. Does not import torch.

Profiler, controller and engine all use this module, so they agree on whether a model fits near a budget.
"""

from collections.abc import Mapping

from helios.architectures.spec import ModelConfig
from helios.catalog import ModelEntry
from helios.modes import Precision

# Bytes of one number of a product's weights, and of a key or value computed beside it. An unknown precision,
# perhaps of a newer worker, counts as the widest one.
_ITEM_BYTES: Mapping[str, int] = {
    Precision.FLOAT32: 4,
    Precision.BFLOAT16: 2,
    Precision.FLOAT16: 2,
    Precision.INT8: 1,
}
_WIDEST_BYTES = 4
# Bytes of norms, and of a product's extra numbers per output channel: a bias, and in int8 also a scale and a
# sum. Or, in models with a gate, a bias and a bfloat16 scale for each group of inputs.
_FLOAT32_BYTES = 4
_INT8_CHANNEL_BYTES = 3 * _FLOAT32_BYTES
_INT8_GROUP, _INT8_GROUP_BYTES = 32, 2
# With int8 weights, lookup tables stay in float16.
_INT8_TABLE_BYTES = 2


def weight_bytes(config: ModelConfig, precision: str, depth: int | None = None) -> int:
    """Bytes of the first `depth` layers (None: all), the embeddings and the LM head, as loaded.

    Padding to whole tiles and exit heads are not counted. precision: the precision of products; a concrete
    one, not `auto`.
    """
    layers = config.num_layers if depth is None else depth
    tables = config.position_rows * config.hidden_size
    if precision == Precision.INT8 or not config.tied_head:
        # Otherwise the embeddings are rows of the LM head.
        tables += config.vocab_size * config.embed_size
    table_bytes = _INT8_TABLE_BYTES if precision == Precision.INT8 else item_bytes(precision)
    norms = (2 * layers + config.has_final_norm) * config.norm_parameters
    norms += config.has_head_norm * 2 * layers * config.head_dim
    head = (config.vocab_size, config.embed_size)
    return (
        tables * table_bytes
        + (norms + config.rotation_numbers) * _FLOAT32_BYTES
        + _product_bytes(config, (head, *config.projections), precision)
        + layers * _product_bytes(config, config.layer_products, precision)
    )


def model_bytes(entry: ModelEntry, precision: str) -> int:
    """Bytes of the weights of a model loaded with all layers and exit heads."""
    config, facts = entry.config, entry.facts
    heads = sum(facts.has_own_head(layer) for layer in facts.exit_layers)
    norm = config.hidden_size * (2 if config.norm == "layer" else 1) * _FLOAT32_BYTES
    linear = (config.hidden_size, config.hidden_size)
    own = norm + _product_bytes(config, (linear,) if facts.exit_head == "linear" else (), precision)
    return weight_bytes(config, precision) + heads * own


def kv_bytes_per_token(config: ModelConfig, depth: int, precision: str) -> int:
    """Bytes of one token's KV in the first `depth` layers, beside products in `precision`.

    In int8 each half of a key and each value of a head has a scale. Padding to whole registers is not
    counted.
    """
    scales = 3 * depth * config.num_kv_heads if precision == Precision.INT8 else 0
    return config.kv_numbers(depth) * item_bytes(precision) + scales * _FLOAT32_BYTES


def activation_bytes(config: ModelConfig, itemsize: int, step_tokens: int, sequences: int) -> int:
    """Most bytes of activations in a step of this many tokens and sequences.

    They are the states, the joined projections or the feed-forward network, and the logits in float32.
    itemsize: bytes of an activation.
    """
    widest = 4 * config.hidden_size + max(channels for channels, _ in config.layer_products)
    return step_tokens * widest * itemsize + 3 * sequences * config.vocab_size * _FLOAT32_BYTES


def item_bytes(precision: str) -> int:
    """Bytes of one number of a product's weights in `precision`, and of a key or value beside it."""
    return _ITEM_BYTES.get(precision, _WIDEST_BYTES)


def _product_bytes(config: ModelConfig, shapes: tuple[tuple[int, int], ...], precision: str) -> int:
    """Bytes of matrices with these shapes [out, in], by which inputs are multiplied."""

    def channel_bytes(in_size: int) -> int:
        if precision == Precision.INT8 and config.is_gated:
            groups = -(-in_size // _INT8_GROUP)
            return groups * (_INT8_GROUP + _INT8_GROUP_BYTES) + _FLOAT32_BYTES
        extra = _INT8_CHANNEL_BYTES if precision == Precision.INT8 else _FLOAT32_BYTES
        return in_size * item_bytes(precision) + extra

    return sum(out_size * channel_bytes(in_size) for out_size, in_size in shapes)
