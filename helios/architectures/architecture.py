"""What tells one architecture from another: how its config.json reads, and what its tensors are called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helios.architectures.fields import Fields
from helios.architectures.spec import ModelConfig


@dataclass(frozen=True, slots=True)
class TensorNames:
    """What a checkpoint calls the parts of a model, without `.weight` and `.bias`.

    {} stands for the layer, counted from 0. A part that the architecture never has is left empty.
    prefixes: what may stand before a name, tried in this order; exports have the first, but not before the
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


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture. Add another: a file beside opt.py, and a line in registry.py.

    read: the model that the fields of a config.json describe; raises CheckpointError. write: the fields that
    describe a model. class_name: transformers' class of the architecture's language models.
    """

    model_type: str
    class_name: str
    names: TensorNames
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
