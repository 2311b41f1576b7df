"""Llama 1 to 3.x (Touvron et al. 2023), as in transformers' LlamaConfig and LlamaForCausalLM.

SmolLM2, TinyLlama, LayerSkip's Llama and CodeLlama have this architecture too. `gated_decoder` and
`written_fields` serve all architectures that differ from it only in biases and norms of heads.
"""

from typing import Any

from helios.architectures.architecture import Architecture, TensorNames
from helios.architectures.fields import Fields
from helios.architectures.rotary import read_rotary, write_rotary
from helios.architectures.spec import ModelConfig

# Names of the parts that all these architectures have.
NAMES = TensorNames(
    # Prefixes in LlamaForCausalLM and in LlamaModel.
    prefixes=("model.", ""),
    embed_tokens="embed_tokens",
    attn_norm="layers.{}.input_layernorm",
    q="layers.{}.self_attn.q_proj",
    k="layers.{}.self_attn.k_proj",
    v="layers.{}.self_attn.v_proj",
    out="layers.{}.self_attn.o_proj",
    ffn_norm="layers.{}.post_attention_layernorm",
    gate="layers.{}.mlp.gate_proj",
    fc1="layers.{}.mlp.up_proj",
    fc2="layers.{}.mlp.down_proj",
    final_norm="norm",
    lm_head="lm_head",
)

# transformers' defaults for fields that a config may leave out.
_CONTEXT_TOKENS, _NORM_EPSILON = 2048, 1e-6


def gated_decoder(
    fields: Fields,
    *,
    num_kv_heads: int,
    head_dim: int,
    qkv_bias: bool = False,
    out_bias: bool = False,
    ffn_bias: bool = False,
    has_head_norm: bool = False,
    context_tokens: int = _CONTEXT_TOKENS,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> ModelConfig:
    """A decoder with RMS norms before each block, rotary positions and a gated feed-forward network (SwiGLU).

    context_tokens, bos_token_id, eos_token_id: defaults for absent fields.
    Raises CheckpointError for values that are wrong or not supported.
    """
    given = fields.values
    heads, vocab, hidden = (
        fields.size("num_attention_heads"),
        fields.size("vocab_size"),
        fields.size("hidden_size"),
    )
    if heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"({num_kv_heads}) must divide num_attention_heads ({heads})"
        )
    if head_dim % 2:
        raise fields.error("head_dim", f"({head_dim}) must be even, because rotary positions pair dimensions")
    fields.choice("hidden_act", ("silu",), given.get("hidden_act", "silu"))
    context = fields.size("max_position_embeddings", context_tokens)
    return ModelConfig(
        model_type=str(given["model_type"]),
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_dim=fields.size("intermediate_size"),
        context_tokens=context,
        embed_size=hidden,
        positions=read_rotary(fields, context),
        norm="rms",
        norm_epsilon=fields.number("rms_norm_eps", _NORM_EPSILON),
        norm_before=True,
        norm_affine=True,
        has_final_norm=True,
        activation="silu",
        is_gated=True,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        ffn_bias=ffn_bias,
        has_head_norm=has_head_norm,
        tied_head=fields.switch("tie_word_embeddings", False),
        bos_token_id=fields.token("bos_token_id", bos_token_id, vocab),
        eos_token_ids=fields.tokens("eos_token_id", eos_token_id, vocab),
        pad_token_id=_padding(fields, vocab),
        dtype=fields.dtype(),
    )


def _padding(fields: Fields, vocab_size: int) -> int | None:
    """The padding token, which Helios never uses. Some Llamas name -1, which means that there is none."""
    return None if fields.values.get("pad_token_id") == -1 else fields.token("pad_token_id", None, vocab_size)


def written_fields(config: ModelConfig, class_name: str) -> dict[str, Any]:
    """The fields of config.json that `gated_decoder` reads, and those that its callers read for it."""
    ends = config.eos_token_ids
    return {
        "architectures": [class_name],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.context_tokens,
        "rope_parameters": write_rotary(config),
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": config.pad_token_id,
        "dtype": config.dtype,
    }


def _read(fields: Fields) -> ModelConfig:
    heads = fields.size("num_attention_heads")
    has_bias = fields.switch("attention_bias", False)
    return gated_decoder(
        fields,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", max(1, fields.size("hidden_size") // heads)),
        qkv_bias=has_bias,
        out_bias=has_bias,
        ffn_bias=fields.switch("mlp_bias", False),
        bos_token_id=1,
        eos_token_id=2,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}
    return written_fields(config, LLAMA.class_name) | biases


LLAMA = Architecture(model_type="llama", class_name="LlamaForCausalLM", names=NAMES, read=_read, write=_write)
