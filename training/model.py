"""The trained model: OPT with the weights of its layers stacked, so that an optimiser step has few products.

It computes the same function as `transformers.OPTForCausalLM` (pre-norm, ReLU, biases, tied embeddings,
learned positions with an offset of 2). `training.export` renames the tensors to that class's names.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios.architectures.opt import POSITION_OFFSET
from training.attention import causal_attention


@dataclass(frozen=True)
class ModelShape:
    """Size of an early-exit OPT. `exit_layers` are numbers of layers; the last one is `num_layers`."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    context: int
    exit_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if not self.exit_layers or self.exit_layers[-1] != self.num_layers:
            raise ValueError(
                f"exit_layers must end with the last layer {self.num_layers}, got {self.exit_layers}"
            )
        if list(self.exit_layers) != sorted(set(self.exit_layers)) or self.exit_layers[0] < 1:
            raise ValueError(f"exit_layers must ascend from 1 or more, got {self.exit_layers}")

    @property
    def ffn_size(self) -> int:
        return 4 * self.hidden_size

    def hf_config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "activation_function": "relu",
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "layerdrop": 0.0,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "tie_word_embeddings": True,
            "init_std": 0.02,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "hidden_size": self.hidden_size,
            "word_embed_proj_dim": self.hidden_size,
            "ffn_dim": self.ffn_size,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "max_position_embeddings": self.context,
            "vocab_size": self.vocab_size,
        }

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class EarlyExitOPT(nn.Module):
    """An OPT decoder. `forward` returns the normed hidden states of the requested exits."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        layers, hidden, ffn = shape.num_layers, shape.hidden_size, shape.ffn_size
        self.embed_tokens = nn.Parameter(torch.randn(shape.vocab_size, hidden) * 0.02)
        self.embed_positions = nn.Parameter(torch.randn(shape.context + POSITION_OFFSET, hidden) * 0.02)
        deep = 0.02 / math.sqrt(2 * layers)  # matrices that write to the residual stream start small
        attention = torch.randn(layers, 4, hidden, hidden) * 0.02
        attention[:, 3] *= deep / 0.02
        self.attention = nn.Parameter(attention)  # q, k, v, out
        self.attention_bias = nn.Parameter(torch.zeros(layers, 4, hidden))
        self.fc1 = nn.Parameter(torch.randn(layers, ffn, hidden) * 0.02)
        self.fc1_bias = nn.Parameter(torch.zeros(layers, ffn))
        self.fc2 = nn.Parameter(torch.randn(layers, hidden, ffn) * deep)
        self.fc2_bias = nn.Parameter(torch.zeros(layers, hidden))
        self.norm_weight = nn.Parameter(torch.ones(layers, 2, hidden))  # before attention, before the ffn
        self.norm_bias = nn.Parameter(torch.zeros(layers, 2, hidden))
        self.final_norm_weight = nn.Parameter(torch.ones(hidden))
        self.final_norm_bias = nn.Parameter(torch.zeros(hidden))

    def matrices(self) -> list[nn.Parameter]:
        """Stacked hidden matrices [..., out, in]. Muon trains these, AdamW all other parameters."""
        return [self.attention, self.fc1, self.fc2]

    def vectors(self) -> list[nn.Parameter]:
        matrices = {id(matrix) for matrix in self.matrices()}
        return [parameter for parameter in self.parameters() if id(parameter) not in matrices]

    def hf_views(self) -> dict[str, Tensor]:
        """Views of the weights under `OPTForCausalLM`'s names, without the LM head, which is tied."""
        decoder = "model.decoder"
        tensors: dict[str, Tensor] = {
            f"{decoder}.embed_tokens.weight": self.embed_tokens,
            f"{decoder}.embed_positions.weight": self.embed_positions,
            f"{decoder}.final_layer_norm.weight": self.final_norm_weight,
            f"{decoder}.final_layer_norm.bias": self.final_norm_bias,
        }
        for layer in range(self.shape.num_layers):
            prefix = f"{decoder}.layers.{layer}"
            for index, name in enumerate(("q_proj", "k_proj", "v_proj", "out_proj")):
                tensors[f"{prefix}.self_attn.{name}.weight"] = self.attention[layer, index]
                tensors[f"{prefix}.self_attn.{name}.bias"] = self.attention_bias[layer, index]
            for index, name in enumerate(("self_attn_layer_norm", "final_layer_norm")):
                tensors[f"{prefix}.{name}.weight"] = self.norm_weight[layer, index]
                tensors[f"{prefix}.{name}.bias"] = self.norm_bias[layer, index]
            for name, weight, bias in (("fc1", self.fc1, self.fc1_bias), ("fc2", self.fc2, self.fc2_bias)):
                tensors[f"{prefix}.{name}.weight"] = weight[layer]
                tensors[f"{prefix}.{name}.bias"] = bias[layer]
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def forward(self, tokens: Tensor, exits: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """For tokens [batch, length]: each exit's normed hidden state [batch, length, hidden] in `dtype`."""
        shape = self.shape
        batch, length = tokens.shape
        hidden, heads = shape.hidden_size, shape.num_heads
        norm = (hidden,)
        positions = self.embed_positions[POSITION_OFFSET : POSITION_OFFSET + length]
        state = (F.embedding(tokens, self.embed_tokens) + positions).to(dtype)  # [batch, length, hidden]
        attention, attention_bias = (
            self.attention.to(dtype).unbind(0),
            self.attention_bias.to(dtype).unbind(0),
        )
        fc1, fc1_bias = self.fc1.to(dtype).unbind(0), self.fc1_bias.to(dtype).unbind(0)
        fc2, fc2_bias = self.fc2.to(dtype).unbind(0), self.fc2_bias.to(dtype).unbind(0)
        norm_weight, norm_bias = self.norm_weight.to(dtype).unbind(0), self.norm_bias.to(dtype).unbind(0)
        final_weight, final_bias = self.final_norm_weight.to(dtype), self.final_norm_bias.to(dtype)
        read_out = []
        for layer in range(max(exits)):
            normed = F.layer_norm(state, norm, norm_weight[layer][0], norm_bias[layer][0])
            qkv = F.linear(normed, attention[layer][:3].flatten(0, 1), attention_bias[layer][:3].flatten())
            qkv = qkv.view(batch, length, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
            query, key, value = qkv.reshape(3, batch * heads, length, hidden // heads).unbind(0)
            mixed = causal_attention(query, key, value)  # [batch * heads, length, head_dim]
            mixed = (
                mixed.view(batch, heads, length, hidden // heads)
                .transpose(1, 2)
                .reshape(batch, length, hidden)
            )
            state = state + F.linear(mixed, attention[layer][3], attention_bias[layer][3])
            normed = F.layer_norm(state, norm, norm_weight[layer][1], norm_bias[layer][1])
            inner = F.relu(F.linear(normed, fc1[layer], fc1_bias[layer]))  # [batch, length, ffn]
            state = state + F.linear(inner, fc2[layer], fc2_bias[layer])
            if layer + 1 in exits:
                read_out.append(F.layer_norm(state, norm, final_weight, final_bias))
        return read_out
