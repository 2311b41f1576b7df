"""Quantises weights to int8 rows with scales, and moves outliers from norms into the products after them."""

from collections.abc import Iterable, Iterator

import torch

from helios.engine.weights.parts import Norm

# Quantising works on this many float32 numbers at a time, which fit into a core's cache.
_CHUNK_ITEMS = 1 << 18
# Rows of a weight that are scaled at a time, to need little extra memory.
_ROWS_AT_ONCE = 64
# Share of a norm's largest weight. Smaller weights are treated as this large.
_LEAST_SIZE = 1e-3


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a weight [out, in] to int8, one scale per row [out]. Symmetric: weight = int8 * scale."""
    return quantize_blocks([weight], *weight.shape)


def quantize_blocks(
    blocks: Iterable[torch.Tensor], out_size: int, in_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `quantize`, for a weight [out, in] that comes in blocks of rows, [rows, in] each."""
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
