"""Linear layers as the model applies them: in a floating-point type, or in int8.

The model does not know which: quantising swaps its linears and nothing else.
"""

from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from helios.engine import kernels
from helios.engine.checkpoint import LinearWeights
from helios.engine.team import TEAM


class Linear(Protocol):
    """y = x @ weight.T + bias: [rows, in] -> [rows, out]."""

    # What it keeps in memory.
    tensors: list[torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def from_channel(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """The output channels from `first` on: [rows, in] -> [rows, out - first]."""
        ...


class DenseLinear:
    """In the type of its weight."""

    def __init__(self, weights: LinearWeights) -> None:
        self._weight, self._bias = weights.weight, weights.bias
        self.tensors = [self._weight] if self._bias is None else [self._weight, self._bias]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def from_channel(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Only these are computed."""
        return F.linear(x, self._weight[first:], None if self._bias is None else self._bias[first:])


class Int8Linear:
    """Weights in int8 with a scale per output channel, input in int8 with a scale per row.

    The sums are exact integers, so a row's result does not depend on the batch that it is in.
    """

    def __init__(self, weights: LinearWeights) -> None:
        """weights: of int8 with scales (`quantize`)."""
        assert weights.scales is not None
        self.out_size, self.in_size = weights.weight.shape
        packed = pack(weights.weight)
        channels = len(packed) * kernels.TILE
        # The input is unsigned around 128; these take what the 128 adds to the sums off again.
        corrections = _padded(128 * weights.weight.sum(1, dtype=torch.int32), channels)
        bias = torch.zeros(self.out_size) if weights.bias is None else weights.bias.float()
        # In the order in which the kernels take them.
        self.tensors = [
            packed,
            corrections,
            _padded(weights.scales.float(), channels),
            _padded(bias, channels),
        ]
        self.addresses = np.array([tensor.data_ptr() for tensor in self.tensors], dtype=np.int64)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        rows = len(x)
        out = x.new_empty(rows, self.out_size)
        scratch = torch.empty(kernels.product_scratch(rows, self.in_size), dtype=torch.uint8)
        TEAM.run(
            kernels.product,
            x.data_ptr(),
            self.in_size,
            rows,
            self.in_size,
            self.addresses,
            0,
            self.out_size,
            out.data_ptr(),
            self.out_size,
            kernels.NONE,
            0,
            scratch.data_ptr(),
        )
        return out

    def from_channel(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """All are computed: a tile of them may lie across `first`."""
        return self(x)[:, first:]


def linear(weights: LinearWeights) -> Linear:
    """The linear layer that applies these weights."""
    return DenseLinear(weights) if weights.scales is None else Int8Linear(weights)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] as int8 and the scale of each row [out], symmetric: weight = int8 * scale."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def pack(weight: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] in the order in which a tile's sums take it: [out / 32, in / 4, 32, 4], zero-padded."""
    out_size, in_size = weight.shape
    rows = -(-out_size // kernels.TILE) * kernels.TILE
    columns = -(-in_size // 8) * 8
    if (rows, columns) != (out_size, in_size):
        padded = weight.new_zeros(rows, columns)
        padded[:out_size, :in_size] = weight
        weight = padded
    tiles = weight.view(rows // kernels.TILE, kernels.TILE, columns // 4, 4)
    return tiles.permute(0, 2, 1, 3).contiguous()


def _padded(values: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(values, (0, size - len(values)))
