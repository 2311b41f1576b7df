"""The known architectures, and how a checkpoint's architecture is found."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from helios.architectures.architecture import Architecture
from helios.architectures.fields import Fields
from helios.architectures.llama import LLAMA
from helios.architectures.opt import OPT
from helios.architectures.qwen import QWEN2, QWEN3
from helios.architectures.spec import ModelConfig
from helios.json_object import read_json_object

CONFIG_FILE = "config.json"
# Generation settings of a checkpoint. Their `eos_token_id` overrides the one of config.json.
GENERATION_FILE = "generation_config.json"

# By `model_type` in config.json.
ARCHITECTURES: Mapping[str, Architecture] = {one.model_type: one for one in (OPT, LLAMA, QWEN2, QWEN3)}


def read_config(path: Path) -> ModelConfig:
    """The config of a checkpoint directory, with the end-of-text tokens that transformers uses.

    They come from generation_config.json, or from config.json if the former names none.
    Raises CheckpointError naming the file, and the field if one is wrong.
    """
    file, generation = path / CONFIG_FILE, path / GENERATION_FILE
    config = config_of(read_json_object(file), file)
    if not generation.exists():
        return config
    fields = Fields(read_json_object(generation), generation)
    ends = fields.tokens("eos_token_id", None, config.vocab_size)
    return replace(config, eos_token_ids=ends or config.eos_token_ids)


def config_of(values: dict[str, Any], file: Path) -> ModelConfig:
    """The config from the fields of a config.json; `file` names it in errors. Raises CheckpointError."""
    fields = Fields(values, file)
    model_type = fields.choice("model_type", tuple(ARCHITECTURES), values.get("model_type"))
    if values.get("quantization_config"):
        raise fields.error(
            "quantization_config",
            "says that the weights are quantised; get the model in float32, bfloat16 or float16",
        )
    return ARCHITECTURES[model_type].read(fields)


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a model."""
    return ARCHITECTURES[config.model_type]
