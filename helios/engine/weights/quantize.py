"""Quantises weights to int8 with scales, and moves outliers from norms into the products after them."""

from collections.abc import Iterable, Iterator

import torch

from helios.architectures.spec import ModelConfig
from helios.engine.kernels import border
from helios.engine.kernels.inner_product import GROUP
from helios.engine.weights.parts import Norm

# Quantising works on this many float32 numbers at a time, which fit into a core's cache.
_CHUNK_ITEMS = 1 << 18
# Rows of a weight that are scaled at a time, to need little extra memory.
_ROWS_AT_ONCE = 64
_TINY = torch.finfo(torch.float32).tiny
# Share of a norm's largest weight. Smaller weights are treated as this large.
_LEAST_SIZE = 1e-3


def has_groups(config: ModelConfig) -> bool:
    """Whether each group of inputs has scales of its own in int8.

    Behind a gate, and in all of such a model's rows, a few numbers are a hundred times larger than the
    others. With one scale per row the others would lose their bits.
    """
    return config.is_gated


def quantize(weight: torch.Tensor, *, in_groups: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a weight [out, in] to int8. Symmetric: weight = int8 * scale.

    Returns the numbers, and one scale per row, [out]. in_groups: one scale for each `GROUP` numbers of a row,
    [out, groups], rounded to bfloat16.
    """
    return quantize_blocks([weight], *weight.shape, in_groups=in_groups)


def quantize_blocks(
    blocks: Iterable[torch.Tensor], out_size: int, in_size: int, *, in_groups: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `quantize`, for a weight [out, in] that comes in blocks of rows, [rows, in] each."""
    groups = -(-in_size // GROUP) if in_groups else 1
    values, scales = torch.empty(out_size, in_size, dtype=torch.int8), torch.empty(out_size, groups)
    row = 0
    for block in blocks:
        for part in block.split(chunk_rows(in_size)):
            numbers, own = part.float(), slice(row, row + len(part))
            if in_groups:
                values[own], scales[own] = _quantize_groups(numbers.contiguous(), groups)
            else:
                steps = numbers.abs().amax(dim=1, keepdim=True).clamp_min_(_TINY) / 127
                values[own], scales[own] = (numbers / steps).round_(), steps
            row += len(part)
    return values, scales if in_groups else scales[:, 0]


def _quantize_groups(numbers: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `quantize` in groups, for float32 [rows, in]."""
    rows, in_size = numbers.shape
    values, scales = torch.empty(rows, groups * GROUP, dtype=torch.int8), torch.empty(rows, groups)
    border.call_quantize(rows, in_size, numbers.data_ptr(), values.data_ptr(), scales.data_ptr())
    return values[:, :in_size], scales


def chunk_rows(in_size: int) -> int:
    """Number of rows of this width that fit into a core's cache."""
    return max(1, _CHUNK_ITEMS // in_size)


def migrate_gammas(norm: Norm) -> tuple[Norm, torch.Tensor | None]:
    """Makes a norm's channels more equal in size, and returns factors for the products that read it.

    The factors [hidden] apply to those products' columns; None: nothing moves. The largest channels of a
    norm's output decide how coarsely its rows are rounded. So the norm's weights (gammas) move into the
    products after it (gamma migration, Wei et al. 2022). Only their square roots move, because the weights of
    those products are rounded too.
    """
    if norm.weight is None:
        return norm, None
    sizes = norm.weight.abs().float()
    moved = sizes.clamp_min(_LEAST_SIZE * sizes.max().item()).sqrt()
    if not moved.all():
        return norm, None
    return Norm(norm.weight / moved, None if norm.bias is None else norm.bias / moved), moved


def scale_columns(blocks: Iterable[torch.Tensor], factors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Multiplies each column of a weight's rows, in blocks [rows, in], by its factor [in]."""
    for block in blocks:
        for part in block.split(_ROWS_AT_ONCE):
            yield part.float() * factors
