"""Exit heads: the modules between a layer's output and the LM head when a token leaves early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from helios.catalog import ExitHeadKind


class ExitHeads(nn.Module):
    """Heads of the exits before the last layer, applied before OPT's `project_out` and LM head.

    `shared` uses the model's final norm. A post-norm model has none: its layers' outputs are read directly.
    `norm` has a LayerNorm per exit. `linear` adds a square matrix without a bias after it (EE-Tuning, Pan et
    al. 2024).
    """

    def __init__(
        self, kind: ExitHeadKind, layers: Sequence[int], hidden_size: int, final_norm: nn.LayerNorm | None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.final_norm = final_norm
        own = layers if kind != "shared" else ()
        self.norms = nn.ModuleDict({str(layer): nn.LayerNorm(hidden_size) for layer in own})
        self.linears = nn.ParameterDict(
            {str(layer): torch.eye(hidden_size) for layer in own} if kind == "linear" else {}
        )

    @torch.no_grad()
    def start_from(self, states: dict[int, Tensor]) -> None:
        """Initialise each exit's own norm so that the exit is read like the last layer.

        Pre-norm models: the norm is a copy of the final norm. Post-norm models read their last layer's output
        without a norm. There the exit's norm is set so that on average it undoes its own normalisation:
        `states` (layer -> [batch, length, hidden]) give the mean and deviation that it must restore.
        """
        for name, norm in self.norms.items():
            assert isinstance(norm, nn.LayerNorm)
            if self.final_norm is not None:
                if self.final_norm.elementwise_affine:
                    norm.load_state_dict(self.final_norm.state_dict())
            else:
                state = states[int(name)].float()
                norm.weight.fill_(state.std(dim=-1, correction=0).mean().item())
                norm.bias.fill_(state.mean().item())

    def forward(self, layer: int, state: Tensor) -> Tensor:
        """Maps a layer's output to the input of `project_out` and the LM head. Both are [..., hidden]."""
        if self.kind == "shared":
            return state if self.final_norm is None else self.final_norm(state)
        read: Tensor = self.norms[str(layer)](state)
        return F.linear(read, self.linears[str(layer)]) if self.kind == "linear" else read

    def own_parameters(self) -> list[nn.Parameter]:
        return [*self.norms.parameters(), *self.linears.parameters()]

    def save(self, path: Path) -> None:
        """Write the exits' own tensors in fp32, named `exits.{layer}.norm.weight` and so on."""
        tensors: dict[str, Tensor] = {}
        for name, norm in self.norms.items():
            for part, tensor in norm.state_dict().items():
                tensors[f"exits.{name}.norm.{part}"] = tensor.contiguous()
        for name, matrix in self.linears.items():
            tensors[f"exits.{name}.linear.weight"] = matrix.detach().contiguous()
        save_file(tensors, str(path), metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        with safe_open(str(path), framework="pt") as file:
            for name, norm in self.norms.items():
                for part in ("weight", "bias"):
                    getattr(norm, part).copy_(file.get_tensor(f"exits.{name}.norm.{part}"))
            for name, matrix in self.linears.items():
                matrix.copy_(file.get_tensor(f"exits.{name}.linear.weight"))
