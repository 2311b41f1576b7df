"""Weights in int8: rows with scales, and norms that leave their outliers to the product behind them."""

from collections.abc import Iterable, Iterator

import torch

from helios.engine.weights.parts import Norm

# Quantising works on so many float32 numbers at a time: as many as a core's cache holds.
_CHUNK_ITEMS = 1 << 18
# Rows of a weight that are scaled at a time, so that little more memory is needed.
_ROWS_AT_ONCE = 64
# A share of a norm's largest weight. Smaller weights move as if they were this large.
_LEAST_SIZE = 1e-3


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] as int8, and the scale of each row [out]. Symmetric: weight = int8 * scale."""
    return quantize_blocks([weight], *weight.shape)


def quantize_blocks(
    blocks: Iterable[torch.Tensor], out_size: int, in_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a weight [out, in] that comes in blocks of rows, [rows, in] each."""
    values, scales = torch.empty(out_size, in_size, dtype=torch.int8), torch.empty(out_size)
    row = 0
    for block in blocks:
        for part in block.split(chunk_rows(in_size)):
            numbers, own = part.float(), slice(row, row + len(part))
            scales[own] = numbers.abs().amax(dim=1).clamp_min_(torch.finfo(torch.float32).tiny) / 127
            values[own] = (numbers / scales[own, None]).round_()
            row += len(part)
    return values, scales


def chunk_rows(in_size: int) -> int:
    """Rows of so many numbers that a core's cache holds."""
    return max(1, _CHUNK_ITEMS // in_size)


def migrate_gammas(norm: Norm) -> tuple[Norm, torch.Tensor | None]:
    """A norm whose channels differ less in size, and the factors [hidden] for the columns of the products
    that read it; None where nothing moves.

    The largest channels of a norm's output decide how coarsely its rows are rounded. So its weights (gammas)
    move into the products behind it (gamma migration, Wei et al. 2022). They move by half, in the exponent,
    since those products' weights are rounded too.
    """
    if norm.weight is None:
        return norm, None
    sizes = norm.weight.abs().float()
    moved = sizes.clamp_min(_LEAST_SIZE * sizes.max().item()).sqrt()
    if not moved.all():
        return norm, None
    return Norm(norm.weight / moved, None if norm.bias is None else norm.bias / moved), moved


def scale_columns(blocks: Iterable[torch.Tensor], factors: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of a weight, in blocks [rows, in], with each column multiplied by its factor [in]."""
    for block in blocks:
        for part in block.split(_ROWS_AT_ONCE):
            yield part.float() * factors
