"""Writes Llama checkpoints as GGUF files, the form that llama.cpp reads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray

from helios.architectures.llama import LLAMA
from helios.architectures.registry import read_config
from helios.architectures.spec import ModelConfig, RotaryPositions
from helios.errors import CheckpointError
from helios.staging import staged
from helios.weight_map import TensorSlot, WeightMap, read_safetensors_header

# By the part's name in `TensorNames`.
_LAYER_PARTS = {
    "attn_norm": MODEL_TENSOR.ATTN_NORM,
    "q": MODEL_TENSOR.ATTN_Q,
    "k": MODEL_TENSOR.ATTN_K,
    "v": MODEL_TENSOR.ATTN_V,
    "out": MODEL_TENSOR.ATTN_OUT,
    "ffn_norm": MODEL_TENSOR.FFN_NORM,
    "gate": MODEL_TENSOR.FFN_GATE,
    "fc1": MODEL_TENSOR.FFN_UP,
    "fc2": MODEL_TENSOR.FFN_DOWN,
}
# Embeddings and LM head keep at least 8 bits, as in published files of 4 bits.
_ENDS_TYPE = GGMLQuantizationType.Q8_0
_NORMAL, _CONTROL = 1, 3  # llama.cpp's types of tokens
_CONTROL_TOKENS = 4


def gguf_model(checkpoint: Path, quantization: str, directory: Path) -> Path:
    """The GGUF file of a checkpoint in `directory`. It is written unless it exists.

    quantization: ggml's name of the type of the matrices, such as Q8_0. With types below 8 bits, embeddings
    and LM head are Q8_0. The vocabulary is a dummy, because benches send token ids. Raises CheckpointError
    when the checkpoint is not a plain Llama, or the file cannot be written.
    """
    path = directory / f"{checkpoint.name}-{quantization.lower()}"
    file = path / "model.gguf"
    if not path.exists():
        with staged(path) as staging:
            write_gguf(checkpoint, GGMLQuantizationType[quantization], staging / file.name)
    return file


def write_gguf(checkpoint: Path, quantization: GGMLQuantizationType, file: Path) -> None:
    """Writes a checkpoint directory as a GGUF file. Norms are in float32. Raises CheckpointError."""
    config = read_config(checkpoint)
    positions = config.positions
    is_plain = config.model_type == LLAMA.model_type and not (config.qkv_bias or config.ffn_bias)
    if not is_plain or not isinstance(positions, RotaryPositions) or positions.scaling is not None:
        raise CheckpointError(
            f"{checkpoint} is not a Llama without biases and scaled positions: no GGUF file is written of it"
        )
    writer = GGUFWriter(file, LLAMA.model_type)
    writer.add_context_length(config.context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(positions.theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_vocabulary(writer, config)
    ends = quantization if quantization in (GGMLQuantizationType.F32, _ENDS_TYPE) else _ENDS_TYPE
    for name, part, values in _tensors(checkpoint, config):
        is_end = part in (MODEL_TENSOR.TOKEN_EMBD, MODEL_TENSOR.OUTPUT)
        kind = GGMLQuantizationType.F32 if values.ndim == 1 else ends if is_end else quantization
        writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: GGUFWriter, config: ModelConfig) -> None:
    """Adds a SentencePiece vocabulary in which every id is a word. llama.cpp's server needs one to start."""
    words = range(_CONTROL_TOKENS, config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        [f"<{index}>" for index in range(_CONTROL_TOKENS)] + [f"\u2581w{index}" for index in words]
    )
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([_CONTROL] * _CONTROL_TOKENS + [_NORMAL] * len(words))
    writer.add_add_bos_token(False)


def _tensors(
    checkpoint: Path, config: ModelConfig
) -> Iterator[tuple[str, MODEL_TENSOR, NDArray[np.float32]]]:
    """Name, part and values of each tensor, in llama.cpp's names and order of rows."""
    names, prefix = LLAMA.names, LLAMA.names.prefixes[0]
    slots = {
        name: (file, slot)
        for file in WeightMap.read(checkpoint).files
        for name, slot in read_safetensors_header(file).items()
    }

    def read(name: str) -> NDArray[np.float32]:
        return _values(*slots[f"{name}.weight"])

    yield TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD], MODEL_TENSOR.TOKEN_EMBD, read(prefix + names.embed_tokens)
    for layer in range(config.num_layers):
        for field, part in _LAYER_PARTS.items():
            values = read(prefix + getattr(names, field).format(layer))
            if field in ("q", "k"):
                values = _paired(values, config.head_dim)
            yield TENSOR_NAMES[part].format(bid=layer), part, values
    yield TENSOR_NAMES[MODEL_TENSOR.OUTPUT_NORM], MODEL_TENSOR.OUTPUT_NORM, read(prefix + names.final_norm)
    if not config.tied_head:
        yield TENSOR_NAMES[MODEL_TENSOR.OUTPUT], MODEL_TENSOR.OUTPUT, read(names.lm_head)


def _paired(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Reorders the rows of queries or keys of each head.

    llama.cpp rotates row 2 * i with its neighbour; transformers rotates row i with row i + head_dim / 2.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _values(file: Path, slot: TensorSlot) -> NDArray[np.float32]:
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[slot.dtype]
    stored = np.memmap(file, dtype=dtype, mode="r", offset=slot.start, shape=slot.shape)
    if slot.dtype == "BF16":
        # bfloat16 is the upper half of float32.
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)
