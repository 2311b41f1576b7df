"""The config.json of well-known models, and how many parameters their cards state."""

from typing import Any

_SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
_LLAMA2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
_LLAMA3_SCALING: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA3: dict[str, Any] = _LLAMA2 | {
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": _LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def _sizes(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


REAL: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M-Instruct": (
        _SMOLLM2 | _sizes(576, 1536, 30, 9) | {"num_key_value_heads": 3},
        134_515_008,
    ),
    "SmolLM2-360M-Instruct": (
        _SMOLLM2 | _sizes(960, 2560, 32, 15) | {"num_key_value_heads": 5},
        361_821_120,
    ),
    "SmolLM2-1.7B-Instruct": (
        _SMOLLM2 | _sizes(2048, 8192, 24, 32) | {"num_key_value_heads": 32, "rope_theta": 130000},
        1_711_376_384,
    ),
    "TinyLlama-1.1B-Chat-v1.0": (
        _LLAMA2
        | _sizes(2048, 5632, 22, 32)
        | {"max_position_embeddings": 2048, "num_key_value_heads": 4, "rope_theta": 10000.0},
        1_100_048_384,
    ),
    "Llama-2-7b-hf": (_LLAMA2, 6_738_415_616),
    # Trained with exits; its architecture is plain Llama 2.
    "layerskip-llama2-7B": (_LLAMA2 | {"rope_theta": 10000.0}, 6_738_415_616),
    "CodeLlama-7b-hf": (
        _LLAMA2 | {"max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016},
        6_738_546_688,
    ),
    "Llama-3.1-8B-Instruct": (_LLAMA3, 8_030_261_248),
    "Llama-3.2-1B-Instruct": (
        _LLAMA3
        | _sizes(2048, 8192, 16, 32)
        | {"head_dim": 64, "rope_scaling": _LLAMA3_SCALING | {"factor": 32.0}, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "Qwen2.5-0.5B-Instruct": (_QWEN2 | _sizes(896, 4864, 24, 14) | {"max_window_layers": 21}, 494_032_768),
    "Qwen2.5-1.5B-Instruct": (_QWEN2 | _sizes(1536, 8960, 28, 12) | {"max_window_layers": 21}, 1_543_714_304),
    "Qwen3-0.6B": (
        _QWEN2
        | _sizes(1024, 3072, 28, 16)
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "sliding_window": None,
        },
        596_049_920,
    ),
}
