"""Checkpoints with seeded random weights. Speed depends on a model's shape, not on its weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from bench.systems.shapes import SHAPES, TINY
from helios.architectures.registry import CONFIG_FILE, architecture_of
from helios.architectures.spec import ModelConfig
from helios.catalog import FACTS_FILE, FORMAT_VERSION, TOKENIZER_FILE
from helios.staging import staged

_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
# Must change when the weights are made differently, because that is another model.
_VERSION = 1
_SEED = 0


def random_model(name: str, directory: Path) -> Path:
    """The checkpoint of a shape in `directory`. It is written in bfloat16, unless it exists.

    It has exits at every quarter of the depth, with the shared head. Raises CheckpointError when it cannot
    be written, KeyError for an unknown shape.
    """
    path = directory / f"{name}-random-{_VERSION}"
    if not path.exists():
        with staged(path) as staging:
            write_random_model((SHAPES | {"tiny": TINY})[name], staging)
    return path


def write_random_model(config: ModelConfig, path: Path) -> None:
    """Writes config, weights, tokenizer and exits of a pre-norm model into a directory.

    The architecture is OPT, or one of Llama's kind without biases and norms of heads.
    """
    generator = np.random.default_rng(_SEED)
    values_of = {}
    for name, shape in _tensor_shapes(config).items():
        values = generator.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values = 1 + np.float32(0.2) * values
        elif len(shape) == 1:
            values *= np.float32(0.02)
        else:
            values *= np.float32(shape[1] ** -0.5)
        values_of[name] = _bfloat16(values)
    tensors = {
        # TensorSpec holds addresses, so `values_of` keeps the arrays alive.
        name: TensorSpec(
            dtype="bfloat16", shape=values.shape, data_ptr=values.ctypes.data, data_len=values.nbytes
        )
        for name, values in values_of.items()
    }
    serialize_file(tensors, path / "model.safetensors", {"format": "pt"})
    # No dropout, because transformers' default for OPT is meant for training.
    fields = architecture_of(config).write(replace(config, dtype="bfloat16")) | {"dropout": 0.0}
    (path / CONFIG_FILE).write_text(json.dumps(fields, indent=2))
    _tokenizer(config.vocab_size).save(str(path / TOKENIZER_FILE))
    (path / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG))
    quarters = sorted({max(1, config.num_layers * part // 4) for part in (1, 2, 3, 4)})
    facts = {
        "format_version": FORMAT_VERSION,
        "exit_layers": quarters,
        "exit_head": "shared",
        "thresholds": {},
        "default_depth": config.num_layers,
        "training": {"recipe": "random", "seed": _SEED},
    }
    (path / FACTS_FILE).write_text(json.dumps(facts, indent=2))


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "</s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def _tensor_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Names and shapes of tensors, as in transformers' class of the architecture."""
    names = architecture_of(config).names
    hidden, ffn, prefix = config.hidden_size, config.ffn_dim, names.prefixes[0]
    shapes = {f"{prefix}{names.embed_tokens}.weight": [config.vocab_size, hidden]}
    if config.position_rows:
        shapes[f"{prefix}{names.embed_positions}.weight"] = [config.position_rows, hidden]
    linears = {
        names.q: (config.query_size, hidden, config.qkv_bias),
        names.k: (config.kv_size, hidden, config.qkv_bias),
        names.v: (config.kv_size, hidden, config.qkv_bias),
        names.out: (hidden, config.query_size, config.out_bias),
        names.fc1: (ffn, hidden, config.ffn_bias),
        names.fc2: (hidden, ffn, config.ffn_bias),
    }
    if config.is_gated:
        linears[names.gate] = (ffn, hidden, config.ffn_bias)
    norms = [names.final_norm]
    for layer in range(config.num_layers):
        norms += [names.attn_norm.format(layer), names.ffn_norm.format(layer)]
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}{name.format(layer)}.weight"] = [rows, columns]
            if has_bias:
                shapes[f"{prefix}{name.format(layer)}.bias"] = [rows]
    for norm in norms:
        shapes[f"{prefix}{norm}.weight"] = [hidden]
        if config.has_norm_bias:
            shapes[f"{prefix}{norm}.bias"] = [hidden]
    if not config.tied_head:
        shapes[f"{names.lm_head}.weight"] = [config.vocab_size, hidden]
    return shapes


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Converts float32 to bfloat16: the upper half of each value, rounded to nearest, ties away from zero."""
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype("<u2")


def _tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer. Every id above the bytes is a separate word, so that each id has text."""
    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"\u0120w{index}" for index in range(len(tokens), vocab_size)]
    vocabulary = {token: index for index, token in enumerate(tokens[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return tokenizer
