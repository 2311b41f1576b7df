"""What distinguishes architectures: the fields of config.json, and the names of tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helios.architectures.fields import Fields
from helios.architectures.spec import ModelConfig


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a model's parts in a checkpoint, without `.weight` and `.bias`.

    {} stands for the layer, counted from 0. The name is empty for a part that the architecture never has.
    prefixes: possible prefixes of all names, tried in this order. Exports use the first one, except for the
    LM head's name.
    """

    prefixes: tuple[str, ...]
    embed_tokens: str
    attn_norm: str
    q: str
    k: str
    v: str
    out: str
    ffn_norm: str
    fc1: str
    fc2: str
    final_norm: str
    lm_head: str
    embed_positions: str = ""
    project_in: str = ""
    project_out: str = ""
    gate: str = ""
    q_norm: str = ""
    k_norm: str = ""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture. To add another, write a file beside opt.py and a line in registry.py.

    read: makes a model's config from the fields of a config.json; raises CheckpointError. write: the fields
    that describe a model. class_name: transformers' class of the architecture's language models.
    """

    model_type: str
    class_name: str
    names: TensorNames
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
