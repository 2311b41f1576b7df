"""Tiny random OPT checkpoints of every variant and file form, written with transformers."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

Form = Literal["safetensors", "sharded-safetensors", "bin", "sharded-bin", "legacy-bin"]
Head = Literal["shared", "norm", "linear"]

FORMS: tuple[Form, ...] = ("safetensors", "sharded-safetensors", "bin", "sharded-bin", "legacy-bin")
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")

_BASE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

# How each variant differs from opt-125m's architecture.
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": _BASE,
    "post-norm": _BASE | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},  # like opt-350m
    "projected": _BASE | {"word_embed_proj_dim": 16},
    "no-bias": _BASE | {"enable_bias": False},
    "no-affine": _BASE | {"layer_norm_elementwise_affine": False},
    "untied": _BASE | {"tie_word_embeddings": False},
    "no-final-norm": _BASE | {"_remove_final_layer_norm": True},
    "gelu": _BASE | {"activation_function": "gelu"},
}


def save_variant(
    path: Path,
    name: str,
    seed: int,
    form: Form = "safetensors",
    exits: Sequence[int] | None = None,
    head: Head = "shared",
    *,
    prefix: Literal["model.decoder.", "decoder.", ""] = "model.decoder.",
    tied_as: Literal["embed_tokens", "lm_head"] = "embed_tokens",
    dtype: torch.dtype = torch.float32,
    thresholds: Mapping[int, float] | None = None,
    **changes: Any,
) -> OPTForCausalLM:
    """Writes a checkpoint directory and returns the model in it, in float32 and eval mode.

    `exits` (the last must be the number of layers) adds a helios.json, and exits.safetensors for the
    heads `norm` and `linear`. Without `exits` the checkpoint is like one from the hub. `tied_as` is the name
    under which tied weights are stored. `changes` go to OPTConfig.
    The tokenizer is byte-level: ids 4 to 259 are the bytes, and prompts start with `</s>`.
    """
    model = random_model(seed, **(VARIANTS[name] | changes)).to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["OPTForCausalLM" if prefix == "model.decoder." else "OPTModel"]
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(path)
    names = {"embed_tokens": "model.decoder.embed_tokens.weight", "lm_head": "lm_head.weight"}
    left_out = {name for key, name in names.items() if key != tied_as and model.config.tie_word_embeddings}
    tensors = {
        key.replace("model.decoder.", prefix): value.contiguous()
        for key, value in model.state_dict().items()
        if key not in left_out
    }
    save_tensors(path, tensors, form)
    save_tokenizer(path)
    if exits is not None:
        save_exits(path, model, seed, exits, head, thresholds or {})
    return model.float().eval()


def random_model(seed: int, **config: Any) -> OPTForCausalLM:
    """A model in which no parameter has its neutral value, not even in biases and norms."""
    return randomized(OPTForCausalLM(OPTConfig(**config)), seed)


def randomized(model: PreTrainedModel, seed: int) -> Any:
    """Gives every parameter of a model a random value, and returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm.weight" in key:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model.eval()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], form: Form) -> None:
    """Writes tensors as one file, or as three shards with an index."""
    if form == "safetensors":
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    elif form in ("bin", "legacy-bin"):
        torch.save(dict(tensors), path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    else:
        stem, suffix = ("model", "safetensors") if form == "sharded-safetensors" else ("pytorch_model", "bin")
        names = sorted(tensors)
        weight_map = {}
        for shard in range(3):
            file = f"{stem}-{shard + 1:05d}-of-00003.{suffix}"
            part = {
                key: tensors[key] for key in names[shard * len(names) // 3 : (shard + 1) * len(names) // 3]
            }
            weight_map.update(dict.fromkeys(part, file))
            if suffix == "bin":
                torch.save(part, path / file)
            else:
                save_file(part, path / file, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges. Like OPT's it puts `</s>` in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return tokenizer


def save_tokenizer(path: Path) -> None:
    """Writes the byte tokenizer in the form that AutoTokenizer reads."""
    byte_tokenizer().save(str(path / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(facts))


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that has the embeddings, the layers and the final norm."""
    base: nn.Module = model.model
    return base.decoder if isinstance(model, OPTForCausalLM) else base


def final_norm_name(model: PreTrainedModel) -> str:
    """The name of the final norm in `decoder_of(model)`."""
    return "final_layer_norm" if isinstance(model, OPTForCausalLM) else "norm"


def truncated(model: PreTrainedModel, depth: int, path: Path | None = None) -> PreTrainedModel:
    """A transformers model of the first `depth` layers, which reads out through that exit's head.

    `path`: the checkpoint whose exits.safetensors, if it has one, holds the heads.
    """
    part = copy.deepcopy(model)
    decoder = decoder_of(part)
    decoder.layers = decoder.layers[:depth]
    part.config.num_hidden_layers = depth
    if getattr(part.config, "layer_types", None):
        part.config.layer_types = part.config.layer_types[:depth]
    file = path / "exits.safetensors" if path is not None else None
    heads = load_file(file) if file is not None and file.exists() else {}
    prefix = f"exits.{depth}."
    own = {key.removeprefix(prefix): value.float() for key, value in heads.items() if key.startswith(prefix)}
    if own:
        hidden = part.config.hidden_size
        is_opt = isinstance(part, OPTForCausalLM)
        norm = nn.LayerNorm(hidden) if is_opt else copy.deepcopy(decoder.norm)
        norm.load_state_dict({key.removeprefix("norm."): own[key] for key in own if "norm." in key})
        linear = nn.Linear(hidden, hidden, bias=False)
        linear.load_state_dict({"weight": own.get("linear.weight", torch.eye(hidden))})
        setattr(decoder, final_norm_name(part), nn.Sequential(norm, linear))
    return part.eval()


def save_exits(
    path: Path,
    model: PreTrainedModel,
    seed: int,
    exits: Sequence[int],
    head: Head,
    thresholds: Mapping[int, float],
) -> None:
    """Adds a helios.json to a checkpoint, and exits.safetensors for the heads `norm` and `linear`."""
    facts = {
        "format_version": 1,
        "exit_layers": list(exits),
        "exit_head": head,
        "thresholds": {str(layer): value for layer, value in thresholds.items()},
        "tokenizer_id": hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest(),
        "default_depth": exits[0],
        "training": {"recipe": "random"},
    }
    (path / "helios.json").write_text(json.dumps(facts))
    if head == "shared":
        return
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {}
    # The last layer is read out through the model's own final norm.
    for layer in exits[:-1]:
        tensors[f"exits.{layer}.norm.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
        # Layer norms have a bias, RMS norms have none.
        if isinstance(model, OPTForCausalLM):
            tensors[f"exits.{layer}.norm.bias"] = 0.2 * torch.randn(hidden, generator=generator)
        if head == "linear":
            noise = torch.randn(hidden, hidden, generator=generator)
            tensors[f"exits.{layer}.linear.weight"] = torch.eye(hidden) + 0.1 * noise
    save_file({key: tensor.to(model.dtype) for key, tensor in tensors.items()}, path / "exits.safetensors")
