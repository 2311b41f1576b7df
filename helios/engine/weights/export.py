"""Writing the first layers of a model as an OPT checkpoint of its own, for other engines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from helios.catalog import FACTS_FILE, TOKENIZER_FILES, read_model
from helios.engine.weights.checkpoint import ExitHead, LinearWeights, ModelWeights, Norm, load_weights
from helios.errors import CheckpointError
from helios.model_config import CONFIG_FILE, GENERATION_FILE, read_json_object
from helios.staging import staged
from helios.weight_map import SINGLE_FILES

_DECODER = "model.decoder"
_LM_HEAD = "lm_head.weight"


def export(
    source: Path,
    target: Path,
    depth: int,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the first `depth` layers of `source` to `target` as a checkpoint that transformers loads.

    It computes what the partial model does: the exit's norm becomes the final norm, and its linear is
    multiplied into project_out, or else into an LM head that is then no longer tied. Weights keep their
    type. progress: called with the layers read and the layers in all.

    Raises UnknownDepthError, CheckpointError when a file is corrupt, `target` exists and not `force`, or
    transformers' OPT has no place for the exit's norm.
    """
    entry = read_model(source)
    config = entry.config
    dtype = getattr(torch, config.dtype)
    with staged(target, replace=force) as staging:
        weights = load_weights(source, config, entry.facts, depth, dtype, progress=progress)
        head = weights.exits.get(depth)
        if head is not None and not (config.norm_before and config.norm_affine):
            raise CheckpointError(
                f"{source / FACTS_FILE}: exit {depth} has a norm of its own, and an OPT checkpoint without "
                "final norm parameters has no place for it; export the whole model instead"
            )
        tensors = _tensors(weights, head)
        fields = read_json_object(source / CONFIG_FILE) | {
            "architectures": ["OPTForCausalLM"],
            "num_hidden_layers": depth,
            "tie_word_embeddings": _LM_HEAD not in tensors,
            "_remove_final_layer_norm": config.norm_before and not config.has_final_norm and head is None,
        }
        (staging / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        for name in (*TOKENIZER_FILES, GENERATION_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        weight_file = staging / SINGLE_FILES[0]
        try:
            save_file(tensors, weight_file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"{target} cannot be written ({error}); choose another place") from error
        # safetensors lets only the owner read what it writes; another engine may run as somebody else.
        shutil.copymode(staging / CONFIG_FILE, weight_file)
    return target


def _tensors(weights: ModelWeights, head: ExitHead | None) -> dict[str, torch.Tensor]:
    """A partial model's tensors under the names of transformers' OPTForCausalLM."""
    project_out, lm_head = weights.project_out, weights.lm_head
    if head is not None and head.linear is not None:
        if project_out is not None:
            project_out = LinearWeights(_product(project_out.weight, head.linear.weight), None)
        else:
            lm_head = _product(lm_head, head.linear.weight)
    norms: dict[str, Norm | None] = {"final_layer_norm": weights.final_norm if head is None else head.norm}
    linears: dict[str, LinearWeights | None] = {"project_in": weights.project_in, "project_out": project_out}
    for index, layer in enumerate(weights.layers):
        name = f"layers.{index}"
        norms[f"{name}.self_attn_layer_norm"] = layer.attn_norm
        norms[f"{name}.final_layer_norm"] = layer.ffn_norm
        linears[f"{name}.self_attn.q_proj"] = layer.q
        linears[f"{name}.self_attn.k_proj"] = layer.k
        linears[f"{name}.self_attn.v_proj"] = layer.v
        linears[f"{name}.self_attn.out_proj"] = layer.out
        linears[f"{name}.fc1"] = layer.fc1
        linears[f"{name}.fc2"] = layer.fc2
    tensors = {
        f"{_DECODER}.embed_tokens.weight": weights.embed_tokens,
        f"{_DECODER}.embed_positions.weight": weights.embed_positions,
    }
    for name, part in (norms | linears).items():
        if part is None:
            continue
        for kind, tensor in (("weight", part.weight), ("bias", part.bias)):
            if tensor is not None:
                tensors[f"{_DECODER}.{name}.{kind}"] = tensor
    if lm_head is not weights.embed_tokens:
        tensors[_LM_HEAD] = lm_head
    return tensors


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, computed in float32 and rounded once."""
    return (left.float() @ right.float()).to(left.dtype)
