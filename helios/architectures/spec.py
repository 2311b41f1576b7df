"""A model described as data: its sizes, and the choices of its architecture.

This is the complete form of a model for Helios, with the same names for every architecture.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Activation = Literal["relu", "gelu", "silu"]
Dtype = Literal["float32", "float16", "bfloat16"]
# layer: uses mean and variance, and has a bias. rms: uses only the root mean square, and has no bias.
NormKind = Literal["layer", "rms"]


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """A table with one vector per position. Its first `offset` rows are unused."""

    offset: int


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Divides all frequencies of rotary positions by `factor`, for a context that is longer by it."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Divides the low frequencies by `factor`, keeps the high ones, and goes smoothly in between (Llama 3.1).

    A frequency is low if fewer than `low_freq_factor` of its periods fit into `original_context` tokens, and
    high if more than `high_freq_factor` do.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class RotaryPositions:
    """Rotates queries and keys by angles that grow with the position (RoFormer, Su et al. 2021).

    Dimension i of a head is paired with dimension i + head_dim / 2, and turns by position * frequency i. The
    frequencies are theta ** (-2 * i / head_dim), scaled.
    """

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


Positions: TypeAlias = LearnedPositions | RotaryPositions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The form of one model."""

    model_type: str  # its architecture (`registry.ARCHITECTURES`)
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # each serves a group of neighbouring query heads
    head_dim: int
    ffn_dim: int
    context_tokens: int
    embed_size: int  # width of the token embedding and the LM head
    positions: Positions
    norm: NormKind
    norm_epsilon: float
    norm_before: bool  # norms come before each block, or else after it
    norm_affine: bool  # norms have weights
    has_final_norm: bool
    activation: Activation  # gelu is the exact one (erf)
    # the feed-forward network is fc2(activation(gate(x)) * fc1(x)), or else fc2(activation(fc1(x)))
    is_gated: bool
    qkv_bias: bool
    out_bias: bool  # bias of the attention's output projection
    ffn_bias: bool
    has_head_norm: bool  # each query and key head has an RMS norm, before the rotation
    tied_head: bool  # the LM head is the token embedding
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # each ends a text
    pad_token_id: int | None
    dtype: Dtype  # type of the stored weights

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, which is also that of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def is_projected(self) -> bool:
        """Whether embeddings are projected to the hidden size, and hidden states back."""
        return self.embed_size != self.hidden_size

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have a bias as well as a weight."""
        return self.norm_affine and self.norm == "layer"

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions. 0 if positions are not learned."""
        if isinstance(self.positions, LearnedPositions):
            return self.positions.offset + self.context_tokens
        return 0

    @property
    def rotation_numbers(self) -> int:
        """Numbers of the table of cosines and sines [context, head_dim]. 0 if positions are not rotary."""
        return self.context_tokens * self.head_dim if isinstance(self.positions, RotaryPositions) else 0

    @property
    def layer_products(self) -> tuple[tuple[int, int], ...]:
        """Shapes [out, in] of a layer's matrices: joined query, key and value; output; feed-forward."""
        hidden, ffn = self.hidden_size, self.ffn_dim
        return (
            (self.query_size + 2 * self.kv_size, hidden),
            (hidden, self.query_size),
            (2 * ffn if self.is_gated else ffn, hidden),
            (hidden, ffn),
        )

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """Shapes [out, in] of the projections between embeddings and layers. Empty for equal widths."""
        hidden, embed = self.hidden_size, self.embed_size
        return ((hidden, embed), (embed, hidden)) if self.is_projected else ()

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm."""
        return self.hidden_size * (self.norm_affine + self.has_norm_bias)

    def parameters(self, num_layers: int | None = None) -> int:
        """Parameters with the first `num_layers` layers (default: all). Tied weights count once."""
        qkv, out, into_ffn, out_of_ffn = (channels for channels, _ in self.layer_products)
        biases = self.qkv_bias * qkv + self.out_bias * out + self.ffn_bias * (into_ffn + out_of_ffn)
        norms = 2 * self.norm_parameters + self.has_head_norm * 2 * self.head_dim
        layer = _total(self.layer_products) + biases + norms
        embeddings = self.vocab_size * self.embed_size
        return (
            embeddings * (1 if self.tied_head else 2)
            + self.position_rows * self.hidden_size
            + _total(self.projections)
            + (self.num_layers if num_layers is None else num_layers) * layer
            + self.has_final_norm * self.norm_parameters
        )

    def step_parameters(self, num_layers: int) -> int:
        """Parameters that a decode step reads: the first `num_layers` layers and the LM head."""
        untied = 0 if self.tied_head else self.vocab_size * self.embed_size
        return self.parameters(num_layers) - self.position_rows * self.hidden_size - untied

    def kv_numbers(self, num_layers: int) -> int:
        """How many numbers one token's KV has in the first `num_layers` layers."""
        return 2 * num_layers * self.kv_size


def _total(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(out_size * in_size for out_size, in_size in shapes)
