"""Shapes of published OPT models. Bytes and operations can be computed from a shape without weights."""

from dataclasses import replace
from pathlib import Path

from helios.architectures.registry import config_of

# Ids below this are special tokens in OPT's vocabularies.
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
    embed_size=64,
)
