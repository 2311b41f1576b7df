"""Tiny random checkpoints of Llama's kind, written with transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.opt_variants import Form, Head, randomized, save_exits, save_tensors, save_tokenizer

_BASE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}

# The architecture of each variant, and how it differs from Llama 2's.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "all-kv-heads": ("llama", {"num_key_value_heads": 6}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),  # like SmolLM2
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide-heads": ("llama", {"head_dim": 16}),
    "odd-widths": ("llama", {"head_dim": 12, "intermediate_size": 70, "hidden_size": 42}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biased": ("qwen3", {"head_dim": 8, "attention_bias": True}),
}


def config_of(name: str, **changes: Any) -> PretrainedConfig:
    """transformers' config of a variant, with these changes."""
    kind, own = VARIANTS[name]
    return _CONFIGS[kind](**(_BASE | own | changes))


def random_model(seed: int, name: str, **changes: Any) -> PreTrainedModel:
    """A model in which no parameter has its neutral value, not even in biases and norms."""
    config = config_of(name, **changes)
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomized(model.float(), seed)


def save_variant(
    path: Path,
    name: str,
    seed: int,
    form: Form = "safetensors",
    exits: Sequence[int] | None = None,
    head: Head = "shared",
    *,
    prefix: Literal["model.", ""] = "model.",
    tied_as: Literal["embed_tokens", "lm_head"] = "embed_tokens",
    dtype: torch.dtype = torch.float32,
    thresholds: Mapping[int, float] | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Writes a checkpoint directory and returns the model in it, in float32 and eval mode.

    Arguments are those of `opt_variants.save_variant`; `changes` go to the config.
    """
    model = random_model(seed, name, **changes)
    # The frequencies of rotary positions stay in float32, as they do when transformers loads a model.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    if not prefix:
        model.config.architectures = [type(model.model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(path)
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    left_out = {name for key, name in names.items() if key != tied_as and model.config.tie_word_embeddings}
    tensors = {
        key.replace("model.", prefix, 1): value.contiguous()
        for key, value in model.state_dict().items()
        if key not in left_out
    }
    save_tensors(path, tensors, form)
    save_tokenizer(path)
    if exits is not None:
        save_exits(path, model, seed, exits, head, thresholds or {})
    return model.float().eval()
