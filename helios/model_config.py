"""The architecture of an OPT checkpoint, as its config.json says it, and its ends of text. Free of torch."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

from helios.errors import CheckpointError

CONFIG_FILE = "config.json"
# What to generate with, where a checkpoint says it: `eos_token_id` in it goes before that in config.json.
GENERATION_FILE = "generation_config.json"
# OPT's learned positions start here (transformers' OPTLearnedPositionalEmbedding).
POSITION_OFFSET = 2

Activation = Literal["relu", "gelu"]
Dtype = Literal["float32", "float16", "bfloat16"]

_ACTIVATIONS = ("relu", "gelu")
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One OPT architecture (transformers' OPTConfig)."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    context_tokens: int  # max_position_embeddings
    embed_size: int  # word_embed_proj_dim: width of the token embedding and the LM head
    norm_before: bool  # do_layer_norm_before: before each block, or after it as in opt-350m
    has_final_norm: bool  # pre-norm, and not `_remove_final_layer_norm`
    has_bias: bool  # enable_bias
    norm_affine: bool  # layer_norm_elementwise_affine
    tied_head: bool  # tie_word_embeddings
    activation: Activation  # gelu is the exact one (erf)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # each ends a text
    pad_token_id: int | None
    dtype: Dtype  # of the stored weights

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def is_projected(self) -> bool:
        """Whether embeddings are projected in and out, as in opt-350m."""
        return self.embed_size != self.hidden_size

    def parameters(self, num_layers: int | None = None) -> int:
        """Parameters with the first `num_layers` layers (default: all), tied weights counted once."""
        hidden, ffn = self.hidden_size, self.ffn_dim
        norm = 2 * hidden if self.norm_affine else 0
        biases = 5 * hidden + ffn if self.has_bias else 0
        layer = 4 * hidden * hidden + 2 * hidden * ffn + biases + 2 * norm
        embeddings = self.vocab_size * self.embed_size
        positions = (self.context_tokens + POSITION_OFFSET) * hidden
        projections = 2 * hidden * self.embed_size if self.is_projected else 0
        return (
            embeddings * (1 if self.tied_head else 2)
            + positions
            + projections
            + (self.num_layers if num_layers is None else num_layers) * layer
            + (norm if self.has_final_norm else 0)
        )

    def step_parameters(self, num_layers: int) -> int:
        """Parameters that a decode step reads: the first `num_layers` layers and the LM head."""
        positions = (self.context_tokens + POSITION_OFFSET) * self.hidden_size
        untied = 0 if self.tied_head else self.vocab_size * self.embed_size
        return self.parameters(num_layers) - positions - untied

    @classmethod
    def read(cls, path: Path) -> Self:
        """The config of a checkpoint directory, its ends of text as transformers takes them.

        generation_config.json goes before config.json. Where it names none, config.json's count.
        Raises CheckpointError naming the file, and the field where one is wrong.
        """
        file, generation = path / CONFIG_FILE, path / GENERATION_FILE
        config = cls.from_fields(read_json_object(file), file)
        if not generation.exists():
            return config
        read = _Fields(read_json_object(generation), generation)
        ends = read.tokens("eos_token_id", None, config.vocab_size)
        return replace(config, eos_token_ids=ends or config.eos_token_ids)

    @classmethod
    def from_fields(cls, fields: dict[str, Any], file: Path) -> Self:
        """The config from parsed JSON; `file` names it in errors. Raises CheckpointError.

        Absent switches take OPTConfig's defaults, as older checkpoints rely on; sizes must be there.
        """
        read = _Fields(fields, file)
        model_type = fields.get("model_type")
        if model_type != "opt":
            raise read.error("model_type", f"is {model_type!r}; Helios serves OPT checkpoints ('opt')")
        hidden = read.size("hidden_size")
        heads = read.size("num_attention_heads")
        if hidden % heads:
            raise read.error("num_attention_heads", f"({heads}) must divide hidden_size ({hidden})")
        # Old checkpoints carry null here for "not projected".
        projected = fields.get("word_embed_proj_dim") is not None
        norm_before = read.switch("do_layer_norm_before", True)
        vocab = read.size("vocab_size")
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            num_layers=read.size("num_hidden_layers"),
            num_heads=heads,
            ffn_dim=read.size("ffn_dim"),
            context_tokens=read.size("max_position_embeddings"),
            embed_size=read.size("word_embed_proj_dim") if projected else hidden,
            norm_before=norm_before,
            has_final_norm=norm_before and not read.switch("_remove_final_layer_norm", False),
            has_bias=read.switch("enable_bias", True),
            norm_affine=read.switch("layer_norm_elementwise_affine", True),
            tied_head=read.switch("tie_word_embeddings", True),
            activation=cast(
                "Activation",
                read.choice("activation_function", _ACTIVATIONS, fields.get("activation_function", "relu")),
            ),
            bos_token_id=read.token("bos_token_id", fields.get("bos_token_id", 2), vocab),
            eos_token_ids=read.tokens("eos_token_id", 2, vocab),
            pad_token_id=read.token("pad_token_id", fields.get("pad_token_id", 1), vocab),
            # transformers 5 writes `dtype`, older ones `torch_dtype`.
            dtype=cast(
                "Dtype",
                read.choice("dtype", _DTYPES, fields.get("dtype") or fields.get("torch_dtype") or "float32"),
            ),
        )


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file when there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is {file.parent} a model directory?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(value).__name__}; fetch it again")
    return value


@dataclass(frozen=True, slots=True)
class _Fields:
    """Checked access to the fields of a JSON object."""

    values: dict[str, Any]
    file: Path

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {name} {problem}")

    def size(self, name: str) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, f"must be a whole number of at least 1, not {value!r}")
        return value

    def switch(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def choice(self, name: str, choices: tuple[str, ...], value: object) -> str:
        if value not in choices:
            raise self.error(name, f"is {value!r}; supported: {', '.join(choices)}")
        return str(value)

    def tokens(self, name: str, default: int | None, vocab_size: int) -> tuple[int, ...]:
        """One id, or a list of them; null is none."""
        value = self.values.get(name, default)
        items = value if isinstance(value, list) else [value]
        found = (self.token(name, item, vocab_size) for item in items)
        return tuple(token for token in found if token is not None)

    def token(self, name: str, value: object, vocab_size: int) -> int | None:
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise self.error(name, f"must be an id of the vocabulary ({vocab_size} tokens), not {value!r}")
        return value
