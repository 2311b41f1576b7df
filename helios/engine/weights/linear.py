"""Linear layers as a model applies them: packed for compiled products on a CPU, or torch's own.

Both have the same interface, so layers that torch runs one by one accept either. A whole step in compiled
code reads the addresses of packed ones instead (`backends/compiled.py`).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from helios.engine.kernels import border
from helios.engine.kernels.inner_product import GROUP, TILE
from helios.engine.kernels.layout import BFLOAT16, FLOAT32, INT8, LINEAR, record
from helios.engine.kernels.product import product_scratch
from helios.engine.kernels.team import TEAM
from helios.engine.weights.parts import LinearWeights
from helios.engine.weights.quantize import chunk_rows

# Version of the contents of a PackedLinear. Raise it whenever the same tensors would mean something else, or
# when contents of earlier versions may be wrong. Since version 4 all numbers are known to be finite. Since
# version 5 a layer has norms of heads, and since version 7 groups of inputs may have scales of their own.
LAYOUT_VERSION = 7

_WORD_BYTES = 4
_PRECISIONS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}
# The fields of LINEAR that correspond to the tensors of a PackedLinear, in order.
_TENSORS = ("weights", "biases", "weight_sums", "scales")


class Linear(Protocol):
    """y = x @ weight.T + bias: [rows, in] -> [rows, out]."""

    # The tensors that it keeps in memory.
    tensors: list[torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def from_channel(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Computes only the output channels from `first` on: [rows, in] -> [rows, out - first]."""
        ...

    def weights_of(self, channels: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight: [n] -> [n, in]."""
        ...


class DenseLinear:
    """A linear layer computed by torch, in the type of its weight."""

    def __init__(self, weights: LinearWeights) -> None:
        self._weight, self._bias = weights.weight, weights.bias
        self.tensors = [self._weight] if self._bias is None else [self._weight, self._bias]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def from_channel(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """See `Linear.from_channel`. Only these channels are computed."""
        return F.linear(x, self._weight[first:], None if self._bias is None else self._bias[first:])

    def weights_of(self, channels: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight."""
        return F.embedding(channels, self._weight)


class PackedLinear:
    """A linear layer computed by `product` in float32, bfloat16 or int8. Input and output are float32.

    In bfloat16 the input is rounded. In int8 the weights have one scale per output channel, and the input has
    one per row. Or both have one for each group of inputs. A row's result is bit-identical whatever other
    rows are in the batch.
    """

    def __init__(self, precision: int, out_size: int, in_size: int, tensors: Sequence[torch.Tensor]) -> None:
        """Wraps the tensors of `pack`, from memory or from a file. precision: a code of `kernels.layout`."""
        self.precision, self.out_size, self.in_size = precision, out_size, in_size
        self.tensors = list(tensors)
        # LINEAR [1], as kernels expect it.
        self.record = self._record_from(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self.record)

    def from_channel(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """See `Linear.from_channel`. Channels before `first` in the same tile are computed too."""
        tile, offset = divmod(first, TILE)
        return self._multiply(x, self._record_from(tile))[:, offset:]

    def weights_of(self, channels: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight, in the type in which it is kept."""
        # [n, in / numbers of a word, numbers of a word]
        rows = self.tensors[0][channels // TILE, :, channels % TILE]
        return rows.flatten(1)[:, : self.in_size]

    def _record_from(self, tile: int) -> NDArray[np.void]:
        """A LINEAR [1] record of the channels from a tile on."""
        weights, *per_channel = self.tensors
        parts = [weights[tile], *(tensor[tile * TILE :] for tensor in per_channel)]
        addresses = {name: part.data_ptr() for name, part in zip(_TENSORS, parts, strict=False)}
        channels = self.out_size - tile * TILE
        groups = weights.shape[1] if weights.dtype == torch.uint8 else 0
        return record(LINEAR, inputs=self.in_size, channels=channels, groups=groups, **addresses)

    def _multiply(self, x: torch.Tensor, linear: NDArray[np.void]) -> torch.Tensor:
        x = x.float().contiguous()
        rows, channels = len(x), int(linear["channels"][0])
        out = x.new_empty(rows, channels)
        scratch = torch.empty(product_scratch(self.precision, rows, self.in_size), dtype=torch.uint8)
        TEAM.run(
            border.call_product,
            self.precision,
            linear,
            x.data_ptr(),
            rows,
            out.data_ptr(),
            scratch.data_ptr(),
            operations=rows * self.in_size * channels,
        )
        return out


def linear(weights: LinearWeights) -> Linear:
    """The linear layer for these weights: packed if kernels support their type, else torch's."""
    packs = weights.weight.device.type == "cpu" and weights.weight.dtype in _PRECISIONS
    return pack(weights) if packs else DenseLinear(weights)


def pack(weights: LinearWeights) -> PackedLinear:
    """Packs weights [out, in] in the order in which a tile's sums use them, padded with zeros.

    Numbers that one step multiplies lie side by side in 32-bit words: float32 [out / 32, in, 32, 1], bfloat16
    [out / 32, in / 2, 32, 2], int8 [out / 32, in / 4, 32, 4]. Then come the biases, [out]. In int8 the sums
    of each channel's weights and the scales follow, [out] each. The kernel needs the sums because its input
    is unsigned. Weights with a scale for each group of inputs are packed by `_pack_groups`.
    """
    out_size, in_size = weights.weight.shape
    if weights.scales is not None and weights.scales.dim() > 1:
        return _pack_groups(weights, weights.scales)
    together = _WORD_BYTES // weights.weight.itemsize
    tiles, steps = -(-out_size // TILE), -(-in_size // together)
    weight, spare = weights.weight, (0, steps * together - in_size, 0, tiles * TILE - out_size)
    if any(spare):
        weight = F.pad(weight, spare)
    # Each word moves as one int32.
    words = weight.view(torch.int32).view(tiles, TILE, steps).transpose(1, 2).contiguous()
    tensors = [
        words.view(weight.dtype).view(tiles, steps, TILE, together),
        torch.zeros(out_size) if weights.bias is None else weights.bias.float(),
    ]
    if weights.scales is not None:
        sums = [part.int().sum(1, dtype=torch.int32) for part in weights.weight.split(chunk_rows(in_size))]
        tensors += [torch.cat(sums), weights.scales.float()]
    tensors[1:] = [F.pad(tensor, (0, tiles * TILE - out_size)) for tensor in tensors[1:]]
    return PackedLinear(_PRECISIONS[weights.weight.dtype], out_size, in_size, tensors)


def _pack_groups(weights: LinearWeights, scales: torch.Tensor) -> PackedLinear:
    """Packs int8 weights [out, in] with scales [out, groups], padded with zeros.

    Each group of a tile has its weights, [GROUP / 4, 32, 4], and then its bfloat16 scales, [32]: bytes [out /
    32, groups, ...]. Then come the biases, [out].
    """
    out_size, in_size = weights.weight.shape
    groups, tiles = scales.shape[1], -(-out_size // TILE)
    rows = (0, 0, 0, tiles * TILE - out_size)
    weight = F.pad(weights.weight, (0, groups * GROUP - in_size, *rows[2:]))
    words = weight.view(torch.int32).view(tiles, TILE, groups, GROUP // 4)
    beside = F.pad(scales, rows).bfloat16().view(tiles, TILE, groups).transpose(1, 2).contiguous()
    packed = torch.cat(
        [
            # [tiles, groups, words, channels]
            words.permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2),
            beside.view(torch.uint8),
        ],
        dim=2,
    )
    bias = torch.zeros(out_size) if weights.bias is None else weights.bias.float()
    return PackedLinear(INT8, out_size, in_size, [packed, F.pad(bias, (0, tiles * TILE - out_size))])
