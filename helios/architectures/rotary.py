"""Reads and writes the fields of config.json that describe rotary positions.

transformers 5 has one object, `rope_parameters`. Older configs have `rope_theta` beside `rope_scaling`, whose
type is called `type` or `rope_type`.
"""

from dataclasses import replace
from typing import Any

from helios.architectures.fields import Fields
from helios.architectures.spec import LinearScaling, Llama3Scaling, ModelConfig, RotaryPositions

# transformers' default.
_THETA = 10_000.0
_TYPES = ("default", "linear", "llama3")


def read_rotary(fields: Fields, context_tokens: int) -> RotaryPositions:
    """The rotary positions that a config describes.

    Like in transformers, a `rope_scaling` that is not empty takes precedence over `rope_parameters`.
    Raises CheckpointError naming the field that is wrong, or the type that is not supported.
    """
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    given = fields.inside(name)
    kind = given.values.get("rope_type", given.values.get("type", "default"))
    if kind not in _TYPES:
        raise fields.error(name, f"is of type {kind!r}; supported: {', '.join(_TYPES)}")
    for part in (fields, given):
        share = part.values.get("partial_rotary_factor")
        if share not in (None, 1):
            raise part.error("partial_rotary_factor", f"is {share!r}; supported: 1, all dimensions rotate")
    positions = RotaryPositions(given.number("rope_theta", fields.number("rope_theta", _THETA)))
    if kind == "linear":
        return replace(positions, scaling=LinearScaling(given.number("factor")))
    if kind == "llama3":
        low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
        if low >= high:
            raise given.error("low_freq_factor", f"({low:g}) must be below high_freq_factor ({high:g})")
        original = given.size("original_max_position_embeddings", context_tokens)
        return replace(positions, scaling=Llama3Scaling(given.number("factor"), low, high, original))
    return positions


def write_rotary(config: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` of a model with rotary positions."""
    positions = config.positions
    assert isinstance(positions, RotaryPositions)
    theta, scaling = {"rope_theta": positions.theta}, positions.scaling
    if isinstance(scaling, LinearScaling):
        return theta | {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return theta | {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return theta | {"rope_type": "default"}
