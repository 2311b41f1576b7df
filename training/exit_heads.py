"""Exit heads: the modules between a layer's output and the LM head when a token leaves early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from helios.architectures.spec import ModelConfig
from helios.catalog import ExitHeadKind


class ExitHeads(nn.Module):
    """Heads of the exits before the last layer. What they give goes to `project_out` and the LM head.

    `shared` uses the model's final norm. A post-norm model has none: its layers' outputs are read directly.
    `norm` has a norm of the model's kind for each exit. `linear` adds a square matrix without a bias after it
    (EE-Tuning, Pan et al. 2024).
    """

    def __init__(
        self, kind: ExitHeadKind, layers: Sequence[int], config: ModelConfig, final_norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.final_norm = final_norm
        own = layers if kind != "shared" else ()
        hidden = config.hidden_size
        self.norms = nn.ModuleDict({str(layer): _norm(config) for layer in own})
        self.linears = nn.ParameterDict(
            {str(layer): torch.eye(hidden) for layer in own} if kind == "linear" else {}
        )

    @torch.no_grad()
    def start_norm(self, layer: int, states: Tensor) -> None:
        """Initialise an exit's own norm so that the exit is read like the last layer.

        Pre-norm models: the norm is a copy of the final norm. Post-norm models read their last layer's output
        without a norm. There the exit's norm is set so that on average it undoes its own normalisation: the
        layer's outputs, `states` [tokens, hidden], give the mean and deviation that it must restore.
        """
        norm = self.norms[str(layer)]
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        if self.final_norm is None:
            norm.weight.fill_(states.float().std(dim=-1, correction=0).mean().item())
            if isinstance(norm, nn.LayerNorm):
                norm.bias.fill_(states.float().mean().item())
        elif self.final_norm.state_dict():  # else its norms have no weights
            norm.load_state_dict(self.final_norm.state_dict())

    def normed(self, layer: int, state: Tensor) -> Tensor:
        """A layer's output behind the exit's norm, before its matrix. Both are [..., hidden]."""
        if self.kind != "shared":
            return self.norms[str(layer)](state)  # type: ignore[no-any-return]
        return state if self.final_norm is None else self.final_norm(state)

    def forward(self, layer: int, state: Tensor) -> Tensor:
        """Maps a layer's output to the input of `project_out` and the LM head. Both are [..., hidden]."""
        read = self.normed(layer, state)
        return F.linear(read, self.linears[str(layer)]) if self.kind == "linear" else read

    def own_parameters(self) -> list[nn.Parameter]:
        return [*self.norms.parameters(), *self.linears.parameters()]

    def save(self, path: Path, dtype: torch.dtype) -> None:
        """Write the exits' own tensors, named `exits.{layer}.norm.weight` and so on."""
        tensors: dict[str, Tensor] = {}
        for name, norm in self.norms.items():
            for part, tensor in norm.state_dict().items():
                tensors[f"exits.{name}.norm.{part}"] = tensor.to(dtype).contiguous()
        for name, matrix in self.linears.items():
            tensors[f"exits.{name}.linear.weight"] = matrix.detach().to(dtype).contiguous()
        save_file(tensors, str(path), metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        with safe_open(str(path), framework="pt") as file:
            for name, norm in self.norms.items():
                for part, tensor in norm.state_dict().items():
                    tensor.copy_(file.get_tensor(f"exits.{name}.norm.{part}"))
            for name, matrix in self.linears.items():
                matrix.copy_(file.get_tensor(f"exits.{name}.linear.weight"))


def _norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_epsilon)
