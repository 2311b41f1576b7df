"""Shapes of published OPT and Llama models.

Bytes and operations can be computed from a shape without weights.
"""

from dataclasses import replace
from pathlib import Path

from helios.architectures.opt import POSITION_OFFSET
from helios.architectures.registry import config_of
from helios.architectures.spec import LearnedPositions

# Ids below this are special tokens, in OPT's vocabularies and in those of the random models.
FIRST_TOKEN = 4

# facebook/opt-1.3b
OPT_1_3B = config_of(
    {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    },
    Path("facebook/opt-1.3b/config.json"),
)
# HuggingFaceTB/SmolLM2-135M. Ids of special tokens are those of the random models.
_SMOLLM2_135M = config_of(
    {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    },
    Path("HuggingFaceTB/SmolLM2-135M/config.json"),
)
# TinyLlama/TinyLlama-1.1B-Chat-v1.0
_TINYLLAMA_1_1B = config_of(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    },
    Path("TinyLlama/TinyLlama-1.1B-Chat-v1.0/config.json"),
)
SHAPES = {
    # facebook/opt-125m and facebook/opt-1.3b
    "opt-125m": replace(
        OPT_1_3B,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        ffn_dim=3072,
        embed_size=768,
    ),
    "opt-1.3b": OPT_1_3B,
    "smollm2": _SMOLLM2_135M,
    "tinyllama-1.1b": _TINYLLAMA_1_1B,
}
# No published model has this shape. It serves to try out a bench.
TINY = replace(
    OPT_1_3B,
    vocab_size=512,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffn_dim=256,
    context_tokens=256,
    positions=LearnedPositions(POSITION_OFFSET, rows=POSITION_OFFSET + 256),
    embed_size=64,
)
