"""Tiny random checkpoints of every architecture, by the name of a variant."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tests import llama_variants, opt_variants

OPT_VARIANTS, LLAMA_VARIANTS = tuple(opt_variants.VARIANTS), tuple(llama_variants.VARIANTS)
VARIANTS = OPT_VARIANTS + LLAMA_VARIANTS
# One of each architecture.
TYPICAL = ("pre-norm", "llama", "qwen2", "qwen3")
# Variants in which the LM head is the token embedding.
TIED = (*(name for name in OPT_VARIANTS if name != "untied"), "tied", "qwen3")


def save_variant(path: Path, name: str, seed: int, *args: Any, **options: Any) -> PreTrainedModel:
    """`save_variant` of `opt_variants` or of `llama_variants`."""
    module = opt_variants if name in opt_variants.VARIANTS else llama_variants
    return module.save_variant(path, name, seed, *args, **options)
