"""Writes the first layers of a model as a separate checkpoint for other engines."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from helios.architectures.architecture import TensorNames
from helios.architectures.registry import CONFIG_FILE, GENERATION_FILE, architecture_of
from helios.architectures.spec import ModelConfig
from helios.catalog import FACTS_FILE, TOKENIZER_FILES, read_model
from helios.engine.weights.part_reader import load_weights
from helios.engine.weights.parts import ExitHead, LinearWeights, ModelWeights, Norm
from helios.errors import CheckpointError
from helios.json_object import read_json_object
from helios.staging import staged
from helios.weight_map import SINGLE_FILES


def export(
    source: Path,
    target: Path,
    depth: int,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the first `depth` layers of `source` to `target` as a checkpoint that transformers loads.

    The export computes the same as the partial model. The exit's norm becomes the final norm. The exit's
    linear is multiplied into project_out, or else into the LM head, which is then no longer tied. Weights
    keep their type. progress: called with the layers read and the number of all layers.

    Raises UnknownDepthError; CheckpointError when a file is corrupt, when `target` exists and not `force`, or
    when the architecture has no place for the exit's norm.
    """
    entry = read_model(source)
    config = entry.config
    dtype = getattr(torch, config.dtype)
    with staged(target, replace=force) as staging:
        weights = load_weights(source, config, entry.facts, depth, dtype, progress=progress)
        head = weights.exits.get(depth)
        if head is not None and not (config.norm_before and config.norm_affine):
            raise CheckpointError(
                f"{source / FACTS_FILE}: exit {depth} has a norm of its own, and a checkpoint without final "
                "norm parameters has no place for it; export the whole model instead"
            )
        names = architecture_of(config).names
        tensors = dict(_tensors(weights, head, names))
        exported = replace(
            config,
            num_layers=depth,
            has_final_norm=config.has_final_norm or head is not None,
            tied_head=_stored(names.lm_head, "weight") not in tensors,
        )
        fields = read_json_object(source / CONFIG_FILE) | _changed_fields(config, exported)
        (staging / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        for name in (*TOKENIZER_FILES, GENERATION_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        weight_file = staging / SINGLE_FILES[0]
        try:
            save_file(tensors, weight_file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"{target} cannot be written ({error}); choose another place") from error
        # safetensors makes its files readable only by their owner, but another engine may run as another
        # user.
        shutil.copymode(staging / CONFIG_FILE, weight_file)
    return target


def _changed_fields(config: ModelConfig, exported: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that the export changes. All other fields of the source stay."""
    architecture = architecture_of(config)
    before, after = architecture.write(config), architecture.write(exported)
    changed = {name: value for name, value in after.items() if value != before[name]}
    # Always set, because the source's config may name the class of the bare model, without an LM head.
    return {"architectures": [architecture.class_name], **changed}


def _tensors(
    weights: ModelWeights, head: ExitHead | None, names: TensorNames
) -> Iterator[tuple[str, torch.Tensor]]:
    """A partial model's tensors, under the names of transformers' language model class."""
    project_out, lm_head = weights.project_out, weights.lm_head
    if head is not None and head.linear is not None:
        if project_out is not None:
            project_out = LinearWeights(_product(project_out.weight, head.linear.weight), None)
        else:
            lm_head = _product(lm_head, head.linear.weight)
    parts: dict[str, Norm | LinearWeights | None] = {
        names.final_norm: weights.final_norm if head is None else head.norm,
        names.project_in: weights.project_in,
        names.project_out: project_out,
    }
    for index, layer in enumerate(weights.layers):
        for part in ("attn_norm", "q", "k", "v", "q_norm", "k_norm", "out", "ffn_norm", "gate", "fc1", "fc2"):
            parts[getattr(names, part).format(index)] = getattr(layer, part)
    decoder = names.prefixes[0]
    yield decoder + _stored(names.embed_tokens, "weight"), weights.embed_tokens
    if weights.embed_positions is not None:
        yield decoder + _stored(names.embed_positions, "weight"), weights.embed_positions
    for name, found in parts.items():
        for kind in ("weight", "bias"):
            tensor = getattr(found, kind, None)
            if tensor is not None:
                yield decoder + _stored(name, kind), tensor
    if lm_head is not weights.embed_tokens:
        yield _stored(names.lm_head, "weight"), lm_head


def _stored(name: str, kind: str) -> str:
    return f"{name}.{kind}"


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, computed in float32 and rounded once."""
    return (left.float() @ right.float()).to(left.dtype)
