"""Shapes of published OPT models. A shape has bytes and operations without having weights."""

from dataclasses import replace

from helios.model_config import ModelConfig

# Ids below this are special tokens in OPT's vocabularies.
FIRST_TOKEN = 4

# facebook/opt-1.3b
OPT_1_3B = ModelConfig(
    vocab_size=50272,
    hidden_size=2048,
    num_layers=24,
    num_heads=32,
    ffn_dim=8192,
    context_tokens=2048,
    embed_size=2048,
    norm_before=True,
    has_final_norm=True,
    has_bias=True,
    norm_affine=True,
    tied_head=True,
    activation="relu",
    bos_token_id=2,
    eos_token_ids=(2,),
    pad_token_id=1,
    dtype="float16",
)
SHAPES = {
    # facebook/opt-125m and facebook/opt-1.3b
    "opt-125m": replace(OPT_1_3B, hidden_size=768, num_layers=12, num_heads=12, ffn_dim=3072, embed_size=768),
    "opt-1.3b": OPT_1_3B,
}
# No published model has this shape. It shows that a bench works.
TINY = replace(
    OPT_1_3B,
    vocab_size=512,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    ffn_dim=256,
    context_tokens=256,
    embed_size=64,
)
