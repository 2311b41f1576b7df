"""Tiny random GGUF files, written with the `gguf` package as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Stored
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

Kind = Literal["llama", "qwen2", "qwen3"]

LAYERS, HEADS, KV_HEADS = 3, 4, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# A byte-level vocabulary like SmolLM2's: special tokens, bytes, and what a few merges make.
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "o r")
TOKENS = (*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES))
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def random_model(kind: Kind = "llama", *, tied: bool = True) -> torch.nn.Module:
    """A tiny random model of transformers."""
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, head_dim=16))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape))
    return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=128))


def write_gguf(
    file: Path,
    kind: Kind = "llama",
    *,
    tied: bool = True,
    linear: Stored = Stored.Q4_1,
    embeddings: Stored = Stored.Q8_0,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    sentencepiece: bool = False,
) -> torch.nn.Module:
    """Writes a random model and returns it, unquantised.

    linear, embeddings: how matrices are stored. metadata: entries to add or replace; None leaves one out.
    tensors: the same, by names of GGUF.
    """
    model = random_model(kind, tied=tied)
    config = model.config
    writer = gguf.GGUFWriter(file, kind)
    entries: dict[str, Any] = {
        "general.license": "apache-2.0",
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.rope.freq_base": 50000.0,
        f"{kind}.vocab_size": config.vocab_size,
        **({f"{kind}.rope.dimension_count": 16} if kind == "llama" else {}),
        **({f"{kind}.attention.key_length": config.head_dim} if kind == "qwen3" else {}),
        **(_sentencepiece() if sentencepiece else _byte_level(kind)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
        **(metadata or {}),
    }
    for key, value in entries.items():
        if value is not None:
            add(writer, key, value)
    arrays: dict[str, tuple[np.ndarray, Stored]] = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        array = parameter.float().numpy()
        if array.ndim == 1:
            arrays[_name(name)] = (_permuted(name, array, kind), Stored.F32)
        else:
            stored = embeddings if "embed" in name or "lm_head" in name else linear
            arrays[_name(name)] = (_permuted(name, array, kind), stored)
    arrays |= {name: (array, Stored.F32) for name, array in (tensors or {}).items() if array is not None}
    for name, (array, stored) in arrays.items():
        if tensors is None or name not in tensors or tensors[name] is not None:
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds an entry of the type that its value has."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _byte_level(kind: Kind) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm" if kind == "llama" else "qwen2",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.add_bos_token": False,
    }


def _sentencepiece() -> dict[str, Any]:
    words = ["▁", "▁w", "he", "ll", "hell", "hello", "w", "o", "r", "l", "d", "h", "e"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += [f"<pad{index}>" for index in range(len(TOKENS) - len(tokens))]
    assert len(tokens) >= len(TOKENS)
    tokens = tokens[: len(TOKENS)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
    }


def _name(name: str) -> str:
    if not name.startswith("model.layers."):
        fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        part, _, end = name.rpartition(".")
        return f"{fixed[part]}.{end}"
    _, _, layer, rest = name.split(".", 3)
    part, _, end = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[part]}.{end}"


def _permuted(name: str, array: np.ndarray, kind: Kind) -> np.ndarray:
    """llama.cpp stores the rows of Llama's queries and keys in pairs of neighbours."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2] if "." in name else "")
    if kind != "llama" or heads is None:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
