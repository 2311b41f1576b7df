"""OPT (Zhang et al. 2022), as in transformers' OPTConfig and OPTForCausalLM.

Supports all variants: norm before each block, or after it without a final norm (opt-350m); embeddings of
another width, projected in and out; with and without biases; tied and untied LM heads.
"""

from typing import Any, cast

from helios.architectures.architecture import Architecture, TensorNames
from helios.architectures.fields import Fields
from helios.architectures.spec import Activation, LearnedPositions, ModelConfig

# Learned positions start at this row (transformers' OPTLearnedPositionalEmbedding).
POSITION_OFFSET = 2
# torch's default, which OPT keeps.
_NORM_EPSILON = 1e-5

_ACTIVATIONS = ("relu", "gelu")


def _read(fields: Fields) -> ModelConfig:
    """Absent switches get OPTConfig's defaults, on which older checkpoints rely. Sizes must be present."""
    given = fields.values
    hidden = fields.size("hidden_size")
    heads = fields.size("num_attention_heads")
    if hidden % heads:
        raise fields.error("num_attention_heads", f"({heads}) must divide hidden_size ({hidden})")
    # Old checkpoints have null here, which means that embeddings are not projected.
    is_projected = given.get("word_embed_proj_dim") is not None
    norm_before = fields.switch("do_layer_norm_before", True)
    has_bias = fields.switch("enable_bias", True)
    vocab = fields.size("vocab_size")
    return ModelConfig(
        model_type=OPT.model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_dim=fields.size("ffn_dim"),
        context_tokens=fields.size("max_position_embeddings"),
        embed_size=fields.size("word_embed_proj_dim") if is_projected else hidden,
        positions=LearnedPositions(POSITION_OFFSET),
        norm="layer",
        norm_epsilon=_NORM_EPSILON,
        norm_before=norm_before,
        norm_affine=fields.switch("layer_norm_elementwise_affine", True),
        has_final_norm=norm_before and not fields.switch("_remove_final_layer_norm", False),
        activation=cast(
            "Activation",
            fields.choice("activation_function", _ACTIVATIONS, given.get("activation_function", "relu")),
        ),
        is_gated=False,
        qkv_bias=has_bias,
        out_bias=has_bias,
        ffn_bias=has_bias,
        has_head_norm=False,
        tied_head=fields.switch("tie_word_embeddings", True),
        bos_token_id=fields.token("bos_token_id", 2, vocab),
        eos_token_ids=fields.tokens("eos_token_id", 2, vocab),
        pad_token_id=fields.token("pad_token_id", 1, vocab),
        dtype=fields.dtype(),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    ends = config.eos_token_ids
    return {
        "architectures": [OPT.class_name],
        "model_type": OPT.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.ffn_dim,
        "max_position_embeddings": config.context_tokens,
        "word_embed_proj_dim": config.embed_size,
        "do_layer_norm_before": config.norm_before,
        "enable_bias": config.qkv_bias,
        "layer_norm_elementwise_affine": config.norm_affine,
        "_remove_final_layer_norm": config.norm_before and not config.has_final_norm,
        "tie_word_embeddings": config.tied_head,
        "activation_function": config.activation,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.dtype,
    }


OPT = Architecture(
    model_type="opt",
    class_name="OPTForCausalLM",
    names=TensorNames(
        # Prefixes in OPTForCausalLM and in OPTModel.
        prefixes=("model.decoder.", "decoder.", ""),
        embed_tokens="embed_tokens",
        embed_positions="embed_positions",
        project_in="project_in",
        project_out="project_out",
        attn_norm="layers.{}.self_attn_layer_norm",
        q="layers.{}.self_attn.q_proj",
        k="layers.{}.self_attn.k_proj",
        v="layers.{}.self_attn.v_proj",
        out="layers.{}.self_attn.out_proj",
        ffn_norm="layers.{}.final_layer_norm",
        fc1="layers.{}.fc1",
        fc2="layers.{}.fc2",
        final_norm="final_layer_norm",
        lm_head="lm_head",
    ),
    read=_read,
    write=_write,
)
