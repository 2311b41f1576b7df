"""Qwen2, Qwen2.5 and Qwen3 (dense), as in transformers' Qwen2ForCausalLM and Qwen3ForCausalLM.

They are Llamas with other biases: Qwen2 always has biases on queries, keys and values and none on the output.
Qwen3 has none by default, but norms on each head of queries and keys.
"""

from dataclasses import replace
from typing import Any

from helios.architectures.architecture import Architecture
from helios.architectures.fields import Fields
from helios.architectures.llama import NAMES, gated_decoder, written_fields
from helios.architectures.spec import ModelConfig

# transformers' defaults for fields that a config may leave out.
_CONTEXT_TOKENS, _QWEN3_HEAD_DIM = 32768, 128
_FULL_ATTENTION = "full_attention"


def _read_qwen2(fields: Fields) -> ModelConfig:
    _refuse_windows(fields)
    heads = fields.size("num_attention_heads")
    return gated_decoder(
        fields,
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim", max(1, fields.size("hidden_size") // heads)),
        qkv_bias=True,
        context_tokens=_CONTEXT_TOKENS,
    )


def _read_qwen3(fields: Fields) -> ModelConfig:
    _refuse_windows(fields)
    has_bias = fields.switch("attention_bias", False)
    return gated_decoder(
        fields,
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim", _QWEN3_HEAD_DIM),
        qkv_bias=has_bias,
        out_bias=has_bias,
        has_head_norm=True,
        context_tokens=_CONTEXT_TOKENS,
    )


def _refuse_windows(fields: Fields) -> None:
    """Raises CheckpointError if a layer attends only to a window of the context."""
    if fields.switch("use_sliding_window", False):
        raise fields.error("use_sliding_window", "is true; supported: false, attention to the whole context")
    types = fields.values.get("layer_types") or []
    if not isinstance(types, list) or any(one != _FULL_ATTENTION for one in types):
        raise fields.error("layer_types", f"is {types!r}; supported: only {_FULL_ATTENTION}")


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return written_fields(config, QWEN2.class_name)


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return written_fields(config, QWEN3.class_name) | {"attention_bias": config.qkv_bias}


QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", NAMES, _read_qwen2, _write_qwen2)
QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    replace(NAMES, q_norm="layers.{}.self_attn.q_norm", k_norm="layers.{}.self_attn.k_norm"),
    _read_qwen3,
    _write_qwen3,
)
