"""The joint loss of the last layer and the exits. Its gradients are written by hand, without autograd.

The last layer's loss is the cross-entropy. Each exit's loss is `exit_weight` x cross-entropy +
`distill_weight` x KL(last || exit). The last layer is the teacher, so it gets no gradient from the exits.
Logits [chunk, vocab] are computed in chunks that stay in the cache. On a CPU that is a third faster than
autograd over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model import EarlyExitOPT

_CHUNK = 256  # rows of logits that are computed at once


class _JointLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Tensor,
        targets: Tensor,
        exit_weight: float,
        distill_weight: float,
        last: Tensor,
        *exits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows = last.size(0)
        grads = [torch.empty_like(hidden) for hidden in (last, *exits)]
        head_grad = torch.zeros(head.shape, dtype=torch.float32)
        last_loss, exit_loss = torch.zeros(()), torch.zeros(())

        def backward(grad: Tensor, hidden: Tensor, out: Tensor, chunk: slice) -> None:
            grad16 = grad.div_(rows).to(hidden.dtype)  # [chunk, vocab]
            out[chunk] = grad16 @ head
            head_grad.add_(grad16.T @ hidden[chunk])

        for start in range(0, rows, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            target = targets[chunk, None]
            hit = torch.full_like(target, -1, dtype=torch.float32)
            teacher = torch.log_softmax((last[chunk] @ head.T).float(), dim=-1)  # [chunk, vocab]
            last_loss -= teacher.gather(1, target).sum()
            teacher.exp_()
            for exit_, out in zip(exits, grads[1:], strict=True):
                student = torch.log_softmax((exit_[chunk] @ head.T).float(), dim=-1)
                exit_loss -= student.gather(1, target).sum() / len(exits)
                student.exp_().mul_(exit_weight + distill_weight).sub_(teacher, alpha=distill_weight)
                backward(student.scatter_add_(1, target, hit * exit_weight), exit_, out, chunk)
            backward(teacher.scatter_add_(1, target, hit), last, grads[0], chunk)
        ctx.save_for_backward(head_grad.to(head.dtype), *grads)
        return last_loss / rows, exit_loss / rows

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        head_grad, *grads = ctx.saved_tensors
        return head_grad, None, None, None, *grads


def joint_loss(
    last: Tensor,
    exits: Sequence[Tensor],
    head: Tensor,
    targets: Tensor,
    exit_weight: float,
    distill_weight: float,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies (nats): of the last layer, and of the exits on average (0 without exits).

    last, exits: normed hidden states [rows, hidden]; head: [vocab, hidden]; targets: [rows] int64. Call
    `backward()` on the first value only: it carries the gradient of the whole weighted loss, to which every
    exit adds with both weights.
    """
    return _JointLoss.apply(head, targets, exit_weight, distill_weight, last, *exits)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def exit_cross_entropies(model: EarlyExitOPT, windows: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of every exit on windows [rows, length + 1]. [exits]"""
    head = model.embed_tokens.bfloat16()
    targets = windows[:, 1:].flatten()
    figures = [
        F.cross_entropy((hidden.flatten(0, 1) @ head.T).float(), targets)
        for hidden in model(windows[:, :-1], model.shape.exit_layers, torch.bfloat16)
    ]
    return torch.stack(figures)
