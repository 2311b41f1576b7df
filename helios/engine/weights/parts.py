"""The parts of a model's weights, as they are in a checkpoint."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """y = x @ weight.T + bias. weight: [out, in], bias: [out].

    scales: [out], only if the weight is int8. Each row must be multiplied by its scale.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's weight and bias, [width] each. None: it has none."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. gate, q_norm, k_norm: None if the architecture has none."""

    attn_norm: Norm
    q: LinearWeights  # [query heads * head_dim, hidden]
    k: LinearWeights  # [KV heads * head_dim, hidden]
    v: LinearWeights  # [KV heads * head_dim, hidden]
    q_norm: Norm | None  # of each query head, [head_dim]
    k_norm: Norm | None  # of each key head, [head_dim]
    out: LinearWeights  # [hidden, query heads * head_dim]
    ffn_norm: Norm
    gate: LinearWeights | None  # [ffn, hidden]
    fc1: LinearWeights  # [ffn, hidden]
    fc2: LinearWeights  # [hidden, ffn]


@dataclass(frozen=True, slots=True)
class ExitHead:
    """An exit's own head, before project_out and the LM head. linear: [hidden, hidden], no bias."""

    norm: Norm
    linear: LinearWeights | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The first `len(layers)` layers of a model, and the parts that read out tokens."""

    embed_tokens: torch.Tensor  # [vocabulary, embed]
    embed_positions: torch.Tensor | None  # [offset + context, hidden]; None: positions are not learned
    project_in: LinearWeights | None  # [hidden, embed]
    project_out: LinearWeights | None  # [embed, hidden]
    layers: list[LayerWeights]
    # None when the model has none, or when every loaded exit has its own.
    final_norm: Norm | None
    # By exit layer. Other exits use final_norm.
    exits: dict[int, ExitHead]
    lm_head: torch.Tensor  # [vocabulary, embed]; the object embed_tokens when tied
    bytes_read: int  # read from the checkpoint's files
