"""Turns a GGUF file into a checkpoint in float32, with transformers' reader and the `gguf` package.

The weights are exactly those that transformers' `from_pretrained(..., gguf_file=)` computes. They are written
tensor by tensor, so a model may be larger than memory.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from helios.architectures.registry import (
    ARCHITECTURES,
    CONFIG_FILE,
    GENERATION_FILE,
    architecture_of,
    config_of,
)
from helios.architectures.spec import ModelConfig
from helios.catalog import TOKENIZER_FILES
from helios.errors import CheckpointError, HeliosError
from helios.sources.gguf_header import GgufArray, GgufHeader, GgufTensor
from helios.sources.progress import Progress
from helios.sources.safetensors_file import write_float32
from helios.weight_map import SINGLE_FILES

# The endings of file names that say how the weights are stored, such as .Q4_1 and -IQ4_XS.
_STORED_AS = re.compile(r"[._-](i?q\d|tq\d|f16|f32|bf16|fp16|fp32|mxfp4|nvfp4)(_[a-z0-9]+)*$", re.IGNORECASE)
# Pieces of a tensor are dequantised to about this many elements.
_PIECE_ELEMENTS = 1 << 24
# The factors of Llama 3's scaled rotary positions. Their original context and borders are those of Llama 3.1
# and 3.2; a file does not name them.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_BORDERS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Sizes that every file must have.
_SIZES = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
)
# End-of-text tokens: all of them end a text.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Byte-level vocabularies whose text is split as GPT-2's, which is what transformers does by default.
_SPLIT_AS_GPT2 = ("default", "gpt-2", "gpt2")


def name_of(file: Path) -> str:
    """The name of a model in a GGUF file: the file's name in lower case, without how the weights are stored.

    The metadata's `general.name` is often the name of a training run.
    """
    stem = _STORED_AS.sub("", file.stem).lower()
    return re.sub(r"[^a-z0-9._]+", "-", stem).strip("-._")


def licence_of(header: GgufHeader) -> str | None:
    """The licence that a GGUF file names."""
    licence = header.metadata.get("general.license")
    return licence if isinstance(licence, str) and licence else None


def read_supported(file: Path) -> GgufHeader:
    """The header of a GGUF file whose architecture Helios serves.

    Raises CheckpointError naming the file and the field.
    """
    header = GgufHeader.read(file)
    from gguf import MODEL_ARCH_NAMES  # noqa: PLC0415

    name = header.text("general.architecture")
    known = [one for one in ARCHITECTURES if one in MODEL_ARCH_NAMES.values()]
    if name is None or name not in known:
        raise header.error(
            "general.architecture", f"is {name!r}, which is not supported; known are {', '.join(known)}"
        )
    if (header.count("split.count") or 1) > 1:
        raise header.error("split.count", "says that the model lies in several files; merge them first")
    sizes = {key: _required(header, f"{name}.{key}") for key in _SIZES}
    if (layers := sizes["block_count"]) > len(header.tensors):
        raise header.error(f"{name}.block_count", f"is {layers}, and there are {len(header.tensors)} tensors")
    for key in ("attention.head_count_kv", "vocab_size"):
        header.count(f"{name}.{key}")
    for key in ("rope.freq_base", "attention.layer_norm_rms_epsilon", "rope.scaling.factor"):
        header.number(f"{name}.{key}")
    rotated = header.count(f"{name}.rope.dimension_count")
    width = header.count(f"{name}.attention.key_length")
    width = width or sizes["embedding_length"] // sizes["attention.head_count"]
    if rotated not in (None, width):
        raise header.error(
            f"{name}.rope.dimension_count",
            f"is {rotated} of {width} dimensions of a head; all must be rotated",
        )
    return header


def _required(header: GgufHeader, key: str) -> int:
    value = header.count(key)
    if value is None:
        raise header.error(key, "is missing")
    return value


def convert(header: GgufHeader, target: Path, progress: Progress) -> None:
    """Writes a checkpoint into the empty folder `target`: config, weights in float32 and tokenizer.

    Raises CheckpointError naming the file and the field or tensor.
    """
    # In a folder of its own, so that transformers finds no other file beside it.
    with _transformers(header), tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(header.file.resolve())
        fields = _config_fields(header, link)
        config = config_of(fields, header.file)
        generation = _generation_fields(header, fields)
        names = _names(header, config)
        _write_tokenizer(header, link, target)
    _write_json(target / CONFIG_FILE, fields)
    _write_json(target / GENERATION_FILE, generation)
    tensors = [tensor for tensor in header.tensors if tensor.name in names]
    needed, free = sum(tensor.elements * 4 for tensor in tensors), shutil.disk_usage(target).free
    if needed > free:
        raise CheckpointError(
            f"{header.file} needs {needed / 1e9:.1f} GB as float32, and {target.parent} has "
            f"{free / 1e9:.1f} GB free; make room"
        )
    shapes = {names[tensor.name]: tensor.shape for tensor in tensors}
    write_float32(target / SINGLE_FILES[0], shapes, _dequantised(header, tensors, fields, progress))


@contextlib.contextmanager
def _transformers(header: GgufHeader) -> Iterator[None]:
    """Around calls of transformers and gguf, which raise any error for files that they cannot read."""
    try:
        yield
    except HeliosError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{header.file} cannot be read by transformers ({type(error).__name__}: {said}); fetch the model "
            "in another file"
        ) from error


def _config_fields(header: GgufHeader, link: Path) -> dict[str, Any]:
    """The fields of config.json. link: the file, alone in its folder."""
    from transformers import AutoConfig  # noqa: PLC0415

    name = cast("str", header.text("general.architecture"))
    config = AutoConfig.from_pretrained(
        link.parent, gguf_file=link.name, local_files_only=True, trust_remote_code=False
    )
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    fields.pop("_name_or_path", None)
    fields.pop("_model_name_or_path", None)
    fields.pop("quantization_config", None)
    heads = header.count(f"{name}.attention.head_count")
    fields |= {
        "model_type": name,
        "architectures": [ARCHITECTURES[name].class_name],
        "dtype": "float32",
        "num_key_value_heads": header.count(f"{name}.attention.head_count_kv") or heads,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
    }
    if (width := header.count(f"{name}.attention.key_length")) is not None:
        fields["head_dim"] = width
    if (scaling := _rope_scaling(header, name)) is not None:
        theta = header.number(f"{name}.rope.freq_base") or 10000.0
        fields["rope_parameters"] = {"rope_theta": theta, **scaling}
    return fields


def _generation_fields(header: GgufHeader, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of generation_config.json: every token that ends a text."""
    vocab, ends = int(fields["vocab_size"]), []
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, GgufArray) and tokens.length > vocab:
        raise header.error("tokenizer.ggml.tokens", f"has {tokens.length} tokens, and the model has {vocab}")
    for key in (f"tokenizer.ggml.{end}" for end in _ENDS):
        value = header.metadata.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab:
            raise header.error(key, f"must be a token below {vocab}, not {value!r}")
        if value not in ends:
            ends.append(value)
    chosen = {key: fields.get(key) for key in ("bos_token_id", "pad_token_id")}
    return {"eos_token_id": ends or None, **chosen}


def _rope_scaling(header: GgufHeader, name: str) -> dict[str, Any] | None:
    """The scaling of rotary positions, which transformers' reader leaves out. None: they are not scaled."""
    key = f"{name}.rope.scaling.type"
    kind = header.text(key)
    if kind == "linear":
        return {"rope_type": "linear", "factor": header.number(f"{name}.rope.scaling.factor") or 1.0}
    if kind not in (None, "none"):
        raise header.error(key, f"is {kind!r}, which is not supported; known are none and linear")
    tensor = next((one for one in header.tensors if one.name == _ROPE_FACTORS), None)
    if tensor is None:
        return None
    factors = np.concatenate([piece.ravel() for piece in _pieces(header, tensor)])
    theta = header.number(f"{name}.rope.freq_base") or 10000.0
    factor = float(factors.max())
    if not np.allclose(_llama3_factors(len(factors), theta, factor), factors, rtol=1e-3):
        raise header.error(_ROPE_FACTORS, "scales rotary positions as no Llama 3 does; pull its safetensors")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_BORDERS}


def _llama3_factors(count: int, theta: float, factor: float) -> NDArray[np.float64]:
    """By what Llama 3.1 divides each frequency of rotary positions."""
    low, high = _LLAMA3_BORDERS["low_freq_factor"], _LLAMA3_BORDERS["high_freq_factor"]
    periods = (
        _LLAMA3_BORDERS["original_max_position_embeddings"]
        * theta ** (-np.arange(count, dtype=np.float64) / count)
        / (2 * math.pi)
    )
    kept = np.clip((periods - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / factor + kept)


def _write_tokenizer(header: GgufHeader, link: Path, target: Path) -> None:
    """Writes tokenizer.json, and beside it the special tokens and the chat template."""
    from tokenizers import pre_tokenizers  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (  # noqa: PLC0415
        GGUF_PRE_TOKENIZER_SPLITS,
    )

    tokenizer = AutoTokenizer.from_pretrained(
        link.parent, gguf_file=link.name, local_files_only=True, trust_remote_code=False
    )
    key = "tokenizer.ggml.pre"
    split = header.text(key)
    if split == "smollm":
        # transformers does not know this name. Each digit is a token of its own.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif header.text("tokenizer.ggml.model") == "gpt2" and not (
        split is None or split in _SPLIT_AS_GPT2 or split in GGUF_PRE_TOKENIZER_SPLITS
    ):
        raise header.error(key, f"is {split!r}, and how that splits text is not known; pull its safetensors")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (Path(folder) / name).is_file():
                shutil.copyfile(Path(folder) / name, target / name)


def _names(header: GgufHeader, config: ModelConfig) -> dict[str, str]:
    """transformers' names by those of the file. Raises CheckpointError for a tensor that has no place."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map  # noqa: PLC0415

    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    found = get_tensor_name_map(kind, config.num_layers)
    biased = {"q": config.qkv_bias, "k": config.qkv_bias, "v": config.qkv_bias, "out": config.out_bias}
    biased |= dict.fromkeys(("gate", "fc1", "fc2"), config.ffn_bias)
    parts = dataclasses.asdict(architecture_of(config).names)
    prefix = parts.pop("prefixes")[0]
    names: dict[str, str] = {}
    for part, form in parts.items():
        layers = range(config.num_layers) if "{}" in form else range(1)
        for name in (form.format(layer) for layer in layers if form):
            full = name if part == "lm_head" else prefix + name
            stored = found.get_name(full)
            if stored is not None:
                names[f"{stored}.weight"] = f"{full}.weight"
                if biased.get(part, False):
                    names[f"{stored}.bias"] = f"{full}.bias"
    for tensor in header.tensors:
        if tensor.name not in names and tensor.name != _ROPE_FACTORS:
            raise header.error(tensor.name, f"has no place in a model of type {config.model_type}")
    return names


def _dequantised(
    header: GgufHeader, tensors: list[GgufTensor], fields: dict[str, Any], progress: Progress
) -> Iterator[NDArray[np.float32]]:
    """The elements of all tensors in float32, in the order of transformers."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor  # noqa: PLC0415

    make: Any = TENSOR_PROCESSORS.get(fields["model_type"], TensorProcessor)
    processor = make(config=fields)
    total, done = sum(tensor.size for tensor in tensors), 0
    for tensor in tensors:
        # The processor permutes the rows of queries and keys, so it needs all of them at once.
        whole = ".attn_q." in tensor.name or ".attn_k." in tensor.name
        for piece in _pieces(header, tensor, whole=whole):
            try:
                ordered = processor.process(weights=piece, name=tensor.name).weights
            except ValueError:
                raise header.error(
                    tensor.name, f"has the shape {list(tensor.shape)}, which does not fit the heads"
                ) from None
            yield ordered
        done += tensor.size
        progress(f"converting {header.file.name}", done, total)


def _pieces(header: GgufHeader, tensor: GgufTensor, *, whole: bool = False) -> Iterator[NDArray[np.float32]]:
    """The dequantised rows of a tensor, some at a time, or all at once if `whole`."""
    from gguf import GGMLQuantizationType, dequantize  # noqa: PLC0415

    kind = GGMLQuantizationType(tensor.type_code)
    rows = tensor.elements // tensor.shape[-1]
    stored = np.memmap(
        header.file, np.uint8, mode="r", offset=tensor.start, shape=(rows, tensor.size // rows)
    )
    step = rows if whole else max(1, _PIECE_ELEMENTS // tensor.shape[-1])
    for row in range(0, rows, step):
        try:
            found = dequantize(stored[row : row + step], kind)
        except NotImplementedError:
            raise header.error(
                tensor.name, f"is stored as {kind.name}, which cannot be dequantised; take another file"
            ) from None
        yield found.reshape(tensor.shape) if whole else found


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
