"""The facts about a class of processors that kernels need."""

from collections.abc import Callable
from dataclasses import dataclass

from helios.engine.kernels.simd import Builder, Value

# Builds LLVM code that adds products to sums. Arguments: builder, sums, a row's word in all lanes, and one
# word of each channel.
DotProduct = Callable[[Builder, Value, Value, Value], Value]


@dataclass(frozen=True, slots=True)
class Target:
    """A class of processors: its names for LLVM, its instructions, and suitable sizes."""

    name: str
    # LLVM's name for the processor on which the class is based, and further features.
    cpu: str
    features: tuple[str, ...]
    # Features that LLVM must find on a processor of the class.
    needs: frozenset[str]
    # Rows of the inner product's largest block, a power of two: the most for which all sums fit in registers.
    block_rows: int
    # One instruction for four byte products, the row's bytes unsigned, the channels' signed. None: there is
    # none.
    byte_dot_product: DotProduct | None = None
    # One instruction for two bfloat16 products. None: there is none.
    bfloat16_dot_product: DotProduct | None = None
