"""Muon for stacked matrices: momentum, then the nearest orthogonal matrix, for all layers in one product.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". `torch.optim.Muon` works
on one matrix at a time. On a CPU that takes a third of a step at width 192; batched products take half of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """The orthogonal factor of each [rows, cols] of `matrices` [..., rows, cols], by Newton-Schulz."""
    a, b, c = _QUINTIC
    x = matrices.flatten(0, -3).bfloat16()  # [stack, rows, cols]
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT.contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if tall:
        x = x.mT
    return x.reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, with decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        newton_schulz_steps: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self._steps = newton_schulz_steps
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp_(state["momentum"], group["momentum"])
                update = orthogonalise(nesterov, self._steps)
                rows, cols = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / cols) ** 0.5)
