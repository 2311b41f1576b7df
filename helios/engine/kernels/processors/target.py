"""What kernels need to know of a class of processors."""

from collections.abc import Callable
from dataclasses import dataclass

from helios.engine.kernels.simd import Builder, Value

# Builds LLVM code that adds products to sums, out of the sums, a word of a row in all lanes, and a word of
# each channel.
DotProduct = Callable[[Builder, Value, Value, Value], Value]


@dataclass(frozen=True, slots=True)
class Target:
    """A class of processors: its names for LLVM, its instructions, and the sizes that suit it."""

    name: str
    # LLVM's name for the processor that the class is based on, and the features beyond it.
    cpu: str
    features: tuple[str, ...]
    # Features that LLVM must find in a processor of the class.
    needs: frozenset[str]
    # Rows of the inner product's largest block, a power of two: as many as leave all sums in registers.
    block_rows: int
    # One instruction for four bytes with four, unsigned of the row and signed of the channels; None: there is
    # none.
    byte_dot_product: DotProduct | None = None
    # One instruction for two bfloat16 with two; None: there is none.
    bfloat16_dot_product: DotProduct | None = None
