"""The inner loop of a product, as LLVM code: a block of input rows times a tile of output channels.

Each step takes one 32-bit word of each row and one of each channel of the tile. A word holds one float32, two
bfloat16 or four bytes. All sums stay in registers. Each sum adds its steps in order, so a row's sums are
bit-identical in every batch. If the processor has an instruction for a step (`processors`), it is used.

In int8 there are two ways. Either a channel has one scale for all inputs, and a row too. Or each group of
`GROUP` inputs has its own scales (`grouped_product`), so that a few large numbers leave the others of their
row and channel their bits.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from helios.engine.kernels.layout import BFLOAT16, FLOAT32, INT8
from helios.engine.kernels.processor import PROCESSOR
from helios.engine.kernels.processors.target import DotProduct
from helios.engine.kernels.simd import (
    LANES,
    LINE_BYTES,
    SINGLE,
    SINGLES,
    SOON,
    WORD,
    WORDS,
    Builder,
    Value,
    build_call,
    build_spread,
    operation,
    words,
)

# Output channels of a tile, and bytes of weights per step. Packed weights have this layout on all processors.
TILE = 2 * LANES
STEP_BYTES = 4 * TILE
# Inputs with a common scale, where groups of inputs have their own. Then a tile of weights is [groups], and
# each group has its bytes, [GROUP / 4, 32, 4], and the bfloat16 scales of its channels, [32].
GROUP = 32
GROUP_BYTES = GROUP * TILE + 2 * TILE
# Rows of the largest block. Smaller blocks have a half, a quarter and so on, down to one row.
BLOCK_ROWS = PROCESSOR.block_rows

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)


def _words(number: int) -> Value:
    return ir.Constant(WORDS, [number] * LANES)


def _single(builder: Builder, sums: Value, row: Value, channels: Value) -> Value:
    """Float32 products."""
    row, channels = builder.bitcast(row, SINGLES), builder.bitcast(channels, SINGLES)
    return build_call("llvm.fma.v16f32", SINGLES)(builder, [row, channels, sums])


def _bfloat16(builder: Builder, sums: Value, row: Value, channels: Value) -> Value:
    """Two bfloat16 products: the upper, then the lower, like the instruction."""
    if PROCESSOR.bfloat16_dot_product is not None:
        return PROCESSOR.bfloat16_dot_product(builder, sums, row, channels)
    upper = _words(-1 << 16)
    sums = _single(builder, sums, builder.and_(row, upper), builder.and_(channels, upper))
    return _single(builder, sums, builder.shl(row, _words(16)), builder.shl(channels, _words(16)))


def _int8(builder: Builder, sums: Value, row: Value, channels: Value) -> Value:
    """Four byte products: the row's bytes are unsigned, the channels' are signed."""
    if PROCESSOR.byte_dot_product is not None:
        return PROCESSOR.byte_dot_product(builder, sums, row, channels)
    for shift in (0, 8, 16, 24):
        left = builder.and_(builder.lshr(row, _words(shift)), _words(255))
        right = builder.ashr(builder.shl(channels, _words(24 - shift)), _words(24))
        sums = builder.add(sums, builder.mul(left, right))
    return sums


def _build_loop(
    builder: Builder, rows: int, kind: Any, accumulate: DotProduct, arguments: Sequence[Value], end: Value
) -> None:
    """Builds all steps of a block (at least one), stores its sums, then jumps to `end`."""
    x, stride, weights, steps, sums, ahead, ahead_step = arguments
    begin, loop = builder.block, builder.append_basic_block()
    words = builder.inttoptr(x, WORD.as_pointer())
    packed = builder.inttoptr(weights, WORDS.as_pointer())
    starts = [builder.gep(words, [builder.mul(stride, ir.Constant(_LONG, row))]) for row in range(rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_LONG)
    step.add_incoming(ir.Constant(_LONG, 0), begin)
    before = [builder.phi(kind) for _ in range(2 * rows)]
    for value in before:
        value.add_incoming(ir.Constant(kind, [0] * LANES), begin)
    next_tile = builder.inttoptr(builder.add(ahead, builder.mul(step, ahead_step)), _BYTE.as_pointer())
    build_call("llvm.prefetch.p0", ir.VoidType())(builder, [next_tile, *SOON])
    channels = []
    for half in (0, 1):
        place = builder.add(builder.mul(step, ir.Constant(_LONG, 2)), ir.Constant(_LONG, half))
        channels.append(builder.load(builder.gep(packed, [place]), align=4))
    after = []
    for row, start in enumerate(starts):
        word = builder.load(builder.gep(start, [step]), align=4)
        spread = build_spread(builder, word, WORDS)
        after += [accumulate(builder, before[2 * row + half], spread, channels[half]) for half in (0, 1)]
    following = builder.add(step, ir.Constant(_LONG, 1))
    step.add_incoming(following, loop)
    for old, new in zip(before, after, strict=True):
        old.add_incoming(new, loop)
    done = builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
    builder.position_at_end(done)
    out = builder.inttoptr(sums, kind.as_pointer())
    for place, value in enumerate(after):
        builder.store(value, builder.gep(out, [ir.Constant(_LONG, place)]), align=4)
    builder.branch(end)


def _inner_product(
    _typing: Any,
    _precision: Any,
    _rows: Any,
    _x: Any,
    _stride: Any,
    _weights: Any,
    _steps: Any,
    _sums: Any,
    _ahead: Any,
    _ahead_step: Any,
) -> Any:
    """Computes all sums of a block of rows with a tile.

    rows: BLOCK_ROWS, or half of it, and so on; x: words [rows, stride]; weights: words [steps, 32]; sums:
    float32 [rows, 32], or int32 in int8; ahead: address of the data to be read next; ahead_step: bytes of it
    to prefetch in each step.
    """

    def generate(context: Any, builder: Builder, _signature: Any, values: Sequence[Value]) -> Value:
        precision, rows, *arguments = values
        wrong, end = builder.append_basic_block(), builder.append_basic_block()
        # Each pair of a precision and a number of rows has its own code.
        codes = ir.Constant(_LONG, BLOCK_ROWS + 1)
        choice = builder.switch(builder.add(builder.mul(precision, codes), rows), wrong)
        for code, kind, accumulate in (
            (FLOAT32, SINGLES, _single),
            (BFLOAT16, SINGLES, _bfloat16),
            (INT8, WORDS, _int8),
        ):
            count = BLOCK_ROWS
            while count:
                block = builder.append_basic_block()
                choice.add_case(ir.Constant(_LONG, code * (BLOCK_ROWS + 1) + count), block)
                builder.position_at_end(block)
                _build_loop(builder, count, kind, accumulate, arguments, end)
                count //= 2
        builder.position_at_end(wrong)
        builder.unreachable()
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), generate


def _build_grouped_loop(builder: Builder, rows: int, arguments: Sequence[Value], end: Value) -> None:
    """Builds all groups of a block (at least one), stores its sums, then jumps to `end`."""
    x, stride, row_scales, weights, groups, sums, ahead, ahead_step = arguments
    begin, loop, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
    words = GROUP // 4

    def at(address: Value, offset: int, kind: Any) -> Value:
        moved = builder.add(address, ir.Constant(_LONG, offset))
        return builder.inttoptr(moved, kind.as_pointer())

    def load(address: Value, offset: int, kind: Any, align: int = 4) -> Value:
        return builder.load(at(address, offset, kind), align=align)

    def times(value: Value, factor: int) -> Value:
        return builder.mul(value, ir.Constant(_LONG, factor))

    row_bytes, scale_bytes = times(stride, 4), times(groups, 8)
    row_starts = [builder.add(x, times(row_bytes, row)) for row in range(rows)]
    scale_starts = [builder.add(row_scales, times(scale_bytes, row)) for row in range(rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    group = builder.phi(_LONG)
    group.add_incoming(ir.Constant(_LONG, 0), begin)
    before = [builder.phi(SINGLES) for _ in range(2 * rows)]
    for value in before:
        value.add_incoming(ir.Constant(SINGLES, [0.0] * LANES), begin)
    own = builder.add(weights, times(group, GROUP_BYTES))
    of_rows = [builder.add(start, times(group, GROUP)) for start in row_starts]
    scales_of_rows = [builder.add(start, times(group, 8)) for start in scale_starts]
    # The integer sums of the rows, and then those of the weights alone: a row of ones.
    partial = [_words(0)] * (2 * rows + 2)
    next_tile = builder.add(ahead, builder.mul(times(group, words), ahead_step))
    for word in range(words):
        for line in range(0, STEP_BYTES, LINE_BYTES):
            prefetched = at(next_tile, line, _BYTE)
            build_call("llvm.prefetch.p0", ir.VoidType())(builder, [prefetched, *SOON])
        next_tile = builder.add(next_tile, ahead_step)
        channels = [load(own, word * STEP_BYTES + 4 * LANES * half, WORDS) for half in (0, 1)]
        spreads = [build_spread(builder, load(start, 4 * word, WORD), WORDS) for start in of_rows]
        for row, spread in enumerate([*spreads, _words(0x01010101)]):
            for half in (0, 1):
                place = 2 * row + half
                partial[place] = _int8(builder, partial[place], spread, channels[half])
    scales = []
    for half in (0, 1):
        bits = load(own, GROUP * TILE + 2 * LANES * half, ir.VectorType(ir.IntType(16), LANES), align=2)
        scales.append(builder.bitcast(builder.shl(builder.zext(bits, WORDS), _words(16)), SINGLES))
    fma = build_call("llvm.fma.v16f32", SINGLES)
    weight_sums = [builder.sitofp(partial[2 * rows + half], SINGLES) for half in (0, 1)]
    after = []
    for row, start in enumerate(scales_of_rows):
        scale, offset = (build_spread(builder, load(start, place, SINGLE), SINGLES) for place in (0, 4))
        for half in (0, 1):
            place = 2 * row + half
            value = builder.fmul(offset, weight_sums[half])
            value = fma(builder, [builder.sitofp(partial[place], SINGLES), scale, value])
            after.append(fma(builder, [value, scales[half], before[place]]))
    following = builder.add(group, ir.Constant(_LONG, 1))
    group.add_incoming(following, loop)
    for old, new in zip(before, after, strict=True):
        old.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, groups), loop, done)
    builder.position_at_end(done)
    for place, value in enumerate(after):
        builder.store(value, at(sums, 4 * LANES * place, SINGLES), align=4)
    builder.branch(end)


def _grouped_product(
    _typing: Any,
    _rows: Any,
    _x: Any,
    _stride: Any,
    _row_scales: Any,
    _weights: Any,
    _groups: Any,
    _sums: Any,
    _ahead: Any,
    _ahead_step: Any,
) -> Any:
    """Computes all sums of a block of rows with a tile whose groups of inputs have their own scales.

    row_scales: of each row and group the scale and the offset of its bytes, float32 [rows, groups, 2]: each
    stands for byte * scale + offset; weights: as described at `GROUP`; sums: float32 [rows, 32]; the rest as
    in `inner_product`.
    """

    def generate(context: Any, builder: Builder, _signature: Any, values: Sequence[Value]) -> Value:
        rows, *arguments = values
        wrong, end = builder.append_basic_block(), builder.append_basic_block()
        choice = builder.switch(rows, wrong)
        count = BLOCK_ROWS
        while count:
            block = builder.append_basic_block()
            choice.add_case(ir.Constant(_LONG, count), block)
            builder.position_at_end(block)
            _build_grouped_loop(builder, count, arguments, end)
            count //= 2
        builder.position_at_end(wrong)
        builder.unreachable()
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), generate


inner_product: Any = intrinsic(_inner_product)
grouped_product: Any = intrinsic(_grouped_product)
# In each lane, adds four byte products to a sum. Arguments: (sums, unsigned bytes, signed bytes).
multiply_bytes = operation(words, (words, words, words), lambda b, v: _int8(b, *v))
