"""Vectors of 16 lanes for kernels compiled by Numba: the few operations that kernels need, as LLVM code.

Addresses are integers (`Tensor.data_ptr`), indices count elements, and nothing is checked, so only kernels
(`jit.compiled`) may call these. On processors with narrower registers LLVM splits the vectors.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_BYTE, _SHORT, WORD, SINGLE = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_HALF = ir.HalfType()
WORDS, SINGLES = ir.VectorType(WORD, LANES), ir.VectorType(SINGLE, LANES)

# Arguments of LLVM's prefetch: for reading, keep in all cache levels, data cache.
SOON = tuple(ir.Constant(WORD, value) for value in (0, 3, 1))
LINE_BYTES = 64

Builder = Any  # llvmlite's ir.IRBuilder, which is untyped
Value = Any


class VectorType(types.Type):
    """The Numba type of 16 lanes in a register."""

    def __init__(self, name: str, lanes: Any) -> None:
        super().__init__(name=name)
        self.lanes = lanes


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: VectorType) -> None:
        super().__init__(manager, kind, kind.lanes)


words = VectorType("words16", WORDS)  # int32
singles = VectorType("singles16", SINGLES)  # float32


def operation(
    result: types.Type, arguments: Sequence[types.Type], build: Callable[[Builder, Sequence[Value]], Value]
) -> Any:
    """Makes an intrinsic with fixed types from the function that builds its code."""
    signature = result(*arguments)

    def generate(context: Any, builder: Builder, _: Any, values: Sequence[Value]) -> Value:
        made = build(builder, values)
        return context.get_dummy_value() if result is types.void else made

    # Numba takes the number of arguments from the signature of the Python function.
    by_arguments = (
        lambda _typing: (signature, generate),
        lambda _typing, _a: (signature, generate),
        lambda _typing, _a, _b: (signature, generate),
        lambda _typing, _a, _b, _c: (signature, generate),
        lambda _typing, _a, _b, _c, _d: (signature, generate),
        lambda _typing, _a, _b, _c, _d, _e: (signature, generate),
        lambda _typing, _a, _b, _c, _d, _e, _f: (signature, generate),
        lambda _typing, _a, _b, _c, _d, _e, _f, _g: (signature, generate),
    )
    return intrinsic(by_arguments[len(arguments)])


def _at(builder: Builder, address: Value, index: Value, element: Any, kind: Any = None) -> Value:
    """Pointer to a `kind` at element `index` after an address."""
    pointer = builder.inttoptr(address, element.as_pointer())
    pointer = builder.gep(pointer, [index])
    return pointer if kind is None else builder.bitcast(pointer, kind.as_pointer())


def _align_of(element: Any) -> int:
    if isinstance(element, ir.IntType):
        return int(element.width // 8)
    return 2 if isinstance(element, ir.HalfType) else 4


def _load(element: Any, kind: Any = None) -> Callable[[Builder, Sequence[Value]], Value]:
    def build(builder: Builder, values: Sequence[Value]) -> Value:
        loaded = builder.load(_at(builder, values[0], values[1], element, kind))
        loaded.align = _align_of(element)
        return loaded

    return build


def _store(element: Any, kind: Any = None) -> Callable[[Builder, Sequence[Value]], Value]:
    def build(builder: Builder, values: Sequence[Value]) -> Value:
        stored = builder.store(values[2], _at(builder, values[0], values[1], element, kind))
        stored.align = _align_of(element)
        return stored

    return build


def build_spread(builder: Builder, value: Value, lanes: Any) -> Value:
    """Builds a vector with one value in all lanes."""
    nothing = ir.Constant(lanes, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(WORD, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(WORDS, [0] * LANES))


def build_call(name: str, result: Any) -> Callable[[Builder, Sequence[Value]], Value]:
    """Builds a call of an LLVM intrinsic, given its name."""

    def build(builder: Builder, values: Sequence[Value]) -> Value:
        kind = ir.FunctionType(result, [value.type for value in values])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)

    return build


def _load_bfloat(builder: Builder, values: Sequence[Value]) -> Value:
    """Loads a bfloat16 as float32: its bits become the upper half."""
    short = builder.load(_at(builder, values[0], values[1], _SHORT), align=2)
    word = builder.shl(builder.zext(short, WORD), ir.Constant(WORD, 16))
    return builder.bitcast(word, SINGLE)


def _sum(builder: Builder, values: Sequence[Value]) -> Value:
    """Adds all lanes in a fixed order: halves the vector and adds the halves until one lane is left."""
    vector = values[0]
    for half in (8, 4, 2, 1):
        order = [*range(half, 2 * half), *([0] * (LANES - half))]
        moved = builder.shuffle_vector(vector, vector, ir.Constant(WORDS, order))
        vector = builder.fadd(vector, moved)
    return builder.extract_element(vector, ir.Constant(WORD, 0))


def _sum_words(builder: Builder, values: Sequence[Value]) -> Value:
    return build_call("llvm.vector.reduce.add.v16i32", WORD)(builder, values)


def _larger(builder: Builder, one: Value, other: Value) -> Value:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _largest(builder: Builder, values: Sequence[Value]) -> Value:
    vector = values[0]
    for half in (8, 4, 2, 1):
        order = [*range(half, 2 * half), *([0] * (LANES - half))]
        moved = builder.shuffle_vector(vector, vector, ir.Constant(WORDS, order))
        vector = _larger(builder, vector, moved)
    return builder.extract_element(vector, ir.Constant(WORD, 0))


# Loads and stores of scalars at (address, index).
load_single = operation(types.float32, (types.intp, types.intp), _load(SINGLE))
store_single = operation(types.void, (types.intp, types.intp, types.float32), _store(SINGLE))
load_half = operation(
    types.float32, (types.intp, types.intp), lambda b, v: b.fpext(_load(_HALF)(b, v), SINGLE)
)
load_bfloat = operation(types.float32, (types.intp, types.intp), _load_bfloat)
load_long = operation(types.int64, (types.intp, types.intp), _load(ir.IntType(64)))
store_long = operation(types.void, (types.intp, types.intp, types.int64), _store(ir.IntType(64)))

load_word = operation(types.int32, (types.intp, types.intp), _load(WORD))
store_word = operation(types.void, (types.intp, types.intp, types.int32), _store(WORD))

# Loads and stores of vectors at (address, index). `spread_*` fill all lanes with one value.
load_singles = operation(singles, (types.intp, types.intp), _load(SINGLE, SINGLES))
store_singles = operation(types.void, (types.intp, types.intp, singles), _store(SINGLE, SINGLES))
load_words = operation(words, (types.intp, types.intp), _load(WORD, WORDS))
spread_single = operation(singles, (types.float32,), lambda b, v: build_spread(b, v[0], SINGLES))


def _load_kept(_typing: Any, address: types.Type, _index: Any) -> Any:
    """Loads 16 key or value numbers as float32. They are float16 if the address is unsigned."""
    is_half = address == types.uintp

    def generate(_context: Any, builder: Builder, _: Any, values: Sequence[Value]) -> Value:
        if not is_half:
            return _load(SINGLE, SINGLES)(builder, values)
        loaded = builder.load(_at(builder, values[0], values[1], _HALF, ir.VectorType(_HALF, LANES)))
        loaded.align = 2
        return builder.fpext(loaded, SINGLES)

    return singles(types.uintp if is_half else types.intp, types.intp), generate


def _as_kept(builder: Builder, value: Value, *, is_half: bool) -> Value:
    """Clamps lanes to the range of float16, so that no infinity is stored. Converts them if is_half."""
    for limit, operation in ((-65504.0, "maxnum"), (65504.0, "minnum")):
        limits = ir.Constant(SINGLES, [limit] * LANES)
        value = build_call(f"llvm.{operation}.v16f32", SINGLES)(builder, [value, limits])
    return builder.fptrunc(value, ir.VectorType(_HALF, LANES)) if is_half else value


def _store_kept(
    _typing: Any, address: types.Type, _index: Any, _stride: Any, _count: Any, _value: Any
) -> Any:
    """Stores the first `count` lanes as key or value numbers, `stride` apart. See `_load_kept`."""
    is_half = address == types.uintp
    element, element_bytes = (_HALF, 2) if is_half else (SINGLE, 4)

    def generate(context: Any, builder: Builder, _: Any, values: Sequence[Value]) -> Value:
        start, index, stride, count, value = values
        value = _as_kept(builder, value, is_half=is_half)

        def store(lane: int) -> None:
            at = builder.add(index, builder.mul(stride, ir.Constant(stride.type, lane)))
            one = builder.extract_element(value, ir.Constant(WORD, lane))
            builder.store(one, _at(builder, start, at, element), align=element_bytes)

        whole = builder.icmp_signed(">=", count, ir.Constant(count.type, LANES))
        with builder.if_else(whole) as (all_of_them, some):
            with all_of_them:
                for lane in range(LANES):
                    store(lane)
            with some:
                for lane in range(LANES):
                    with builder.if_then(builder.icmp_signed(">", count, ir.Constant(count.type, lane))):
                        store(lane)
        return context.get_dummy_value()

    kept = types.uintp if is_half else types.intp
    return types.void(kept, types.intp, types.intp, types.intp, singles), generate


def _fetch_kept(_typing: Any, address: types.Type, _index: Any, _count: Any) -> Any:
    """Prefetches the cache lines of `count` key or value numbers."""
    is_half = address == types.uintp
    element = _HALF if is_half else SINGLE

    def generate(context: Any, builder: Builder, _: Any, values: Sequence[Value]) -> Value:
        start, index, count = values
        step = ir.Constant(count.type, LINE_BYTES // (2 if is_half else 4))
        with cgutils.for_range_slice(builder, ir.Constant(count.type, 0), count, step, count.type) as (at, _):
            line = _at(builder, start, builder.add(index, at), element, _BYTE)
            build_call("llvm.prefetch.p0", ir.VoidType())(builder, [line, *SOON])
        return context.get_dummy_value()

    return types.void(types.uintp if is_half else types.intp, types.intp, types.intp), generate


load_kept: Any = intrinsic(_load_kept)
store_kept: Any = intrinsic(_store_kept)
fetch_kept: Any = intrinsic(_fetch_kept)


def _first(builder: Builder, count: Value) -> Value:
    """True in the first `count` lanes."""
    numbers = ir.Constant(WORDS, list(range(LANES)))
    return builder.icmp_signed("<", numbers, build_spread(builder, builder.trunc(count, WORD), WORDS))


def _load_some(builder: Builder, values: Sequence[Value]) -> Value:
    pointer = _at(builder, values[0], values[1], SINGLE, SINGLES)
    nothing = ir.Constant(SINGLES, [0.0] * LANES)
    arguments = [pointer, ir.Constant(WORD, 4), _first(builder, values[2]), nothing]
    return build_call("llvm.masked.load.v16f32.p0", SINGLES)(builder, arguments)


def _store_some(builder: Builder, values: Sequence[Value]) -> Value:
    pointer = _at(builder, values[0], values[1], SINGLE, SINGLES)
    arguments = [values[3], pointer, ir.Constant(WORD, 4), _first(builder, values[2])]
    return build_call("llvm.masked.store.v16f32.p0", ir.VoidType())(builder, arguments)


# Loads and stores of only the first `count` lanes at (address, index, count). Loads set the other lanes to
# zero; stores do not write them.
load_some = operation(singles, (types.intp, types.intp, types.intp), _load_some)
store_some = operation(types.void, (types.intp, types.intp, types.intp, singles), _store_some)


def _store_low_bytes(builder: Builder, values: Sequence[Value]) -> Value:
    octets = ir.VectorType(_BYTE, LANES)
    return _store(_BYTE, octets)(builder, [values[0], values[1], builder.trunc(values[2], octets)])


def _store_bytes(builder: Builder, values: Sequence[Value]) -> Value:
    """Stores each lane, a whole number from -128 to 255, as a byte."""
    return _store_low_bytes(builder, [values[0], values[1], builder.fptosi(values[2], WORDS)])


def _store_bfloats(builder: Builder, values: Sequence[Value]) -> Value:
    """Stores each lane as bfloat16: its upper half, rounded to nearest, ties to even."""
    bits = builder.bitcast(values[2], WORDS)
    one, half = ir.Constant(WORDS, [1] * LANES), ir.Constant(WORDS, [0x7FFF] * LANES)
    upper = ir.Constant(WORDS, [16] * LANES)
    odd = builder.and_(builder.lshr(bits, upper), one)
    rounded = builder.lshr(builder.add(bits, builder.add(odd, half)), upper)
    shorts = ir.VectorType(_SHORT, LANES)
    return _store(_SHORT, shorts)(builder, [values[0], values[1], builder.trunc(rounded, shorts)])


# Stores of vectors at (address, index of the byte or bfloat16).
store_bytes = operation(types.void, (types.intp, types.intp, singles), _store_bytes)
store_low_bytes = operation(types.void, (types.intp, types.intp, words), _store_low_bytes)
store_bfloats = operation(types.void, (types.intp, types.intp, singles), _store_bfloats)
round_to_even = operation(singles, (singles,), build_call("llvm.rint.v16f32", SINGLES))
no_words = operation(words, (), lambda _b, _v: ir.Constant(WORDS, [0] * LANES))
no_singles = operation(singles, (), lambda _b, _v: ir.Constant(SINGLES, [0.0] * LANES))
add_words = operation(words, (words, words), lambda b, v: b.add(*v))
subtract_words = operation(words, (words, words), lambda b, v: b.sub(*v))
multiply_words = operation(words, (words, words), lambda b, v: b.mul(*v))
to_words = operation(words, (singles,), lambda b, v: b.fptosi(v[0], WORDS))
both_of = operation(words, (words, words), lambda b, v: b.and_(*v))
either_of = operation(words, (words, words), lambda b, v: b.or_(*v))
shift_left = operation(words, (words, words), lambda b, v: b.shl(*v))
shift_right = operation(words, (words, words), lambda b, v: b.lshr(*v))
to_singles = operation(singles, (words,), lambda b, v: b.sitofp(v[0], SINGLES))
add = operation(singles, (singles, singles), lambda b, v: b.fadd(*v))
subtract = operation(singles, (singles, singles), lambda b, v: b.fsub(*v))
multiply = operation(singles, (singles, singles), lambda b, v: b.fmul(*v))
divide = operation(singles, (singles, singles), lambda b, v: b.fdiv(*v))
multiply_add = operation(singles, (singles, singles, singles), build_call("llvm.fma.v16f32", SINGLES))
# If either operand is NaN, returns the second, like x86 maxps.
larger = operation(singles, (singles, singles), lambda b, v: _larger(b, *v))
absolute = operation(singles, (singles,), build_call("llvm.fabs.v16f32", SINGLES))
floor = operation(singles, (singles,), build_call("llvm.floor.v16f32", SINGLES))
total_words = operation(types.int32, (words,), _sum_words)
total = operation(types.float32, (singles,), _sum)
largest = operation(types.float32, (singles,), _largest)


# The numbers 0 to 15, and one number in all lanes.
lane_numbers = operation(words, (), lambda _b, _v: ir.Constant(WORDS, list(range(LANES))))
spread_word = operation(words, (types.int32,), lambda b, v: build_spread(b, v[0], WORDS))
store_words = operation(types.void, (types.intp, types.intp, words), _store(WORD, WORDS))
# Per lane: c where a > b, else d.
where_greater = operation(
    words,
    (singles, singles, words, words),
    lambda b, v: b.select(b.fcmp_ordered(">", v[0], v[1]), v[2], v[3]),
)
# Per lane: c where a > b, else 0.
where_above = operation(
    singles,
    (singles, singles, singles),
    lambda b, v: b.select(b.fcmp_ordered(">", v[0], v[1]), v[2], ir.Constant(SINGLES, [0.0] * LANES)),
)


def _lanes_between(builder: Builder, values: Sequence[Value]) -> Value:
    inside = builder.and_(
        builder.fcmp_ordered(">", values[0], values[1]), builder.fcmp_ordered("<=", values[0], values[2])
    )
    return builder.zext(builder.bitcast(inside, ir.IntType(LANES)), ir.IntType(64))


# A bit per lane, the lowest for the first: whether a is above b and at most c.
lanes_between = operation(types.int64, (singles, singles, singles), _lanes_between)
# The bits of a float32 as an integer, and back.
bits_of = operation(types.int64, (types.float32,), lambda b, v: b.zext(b.bitcast(v[0], WORD), ir.IntType(64)))
single_of = operation(types.float32, (types.int64,), lambda b, v: b.bitcast(b.trunc(v[0], WORD), SINGLE))


def _power_of_two(builder: Builder, values: Sequence[Value]) -> Value:
    """2 to the power of whole numbers, built from the bits of a float's exponent."""
    number = builder.fptosi(values[0], WORDS)
    biased = builder.add(number, ir.Constant(WORDS, [127] * LANES))
    return builder.bitcast(builder.shl(biased, ir.Constant(WORDS, [23] * LANES)), SINGLES)


power_of_two = operation(singles, (singles,), _power_of_two)


def _keep(_typing: Any, array: types.Type) -> Any:
    return types.void(array), lambda context, _builder, _signature, _values: context.get_dummy_value()


# Keeps an array's memory alive up to this call. Numba frees an array after its last use and does not count
# uses of its address. So a kernel that takes an array's address calls this at its end.
keep: Any = intrinsic(_keep)


# Counters that threads share, at (address, index).
_LONG = ir.IntType(64)
load_shared = operation(
    types.int64,
    (types.intp, types.intp),
    lambda b, v: b.load_atomic(_at(b, v[0], v[1], _LONG), "acquire", 8),
)
store_shared = operation(
    types.void,
    (types.intp, types.intp, types.int64),
    lambda b, v: b.store_atomic(v[2], _at(b, v[0], v[1], _LONG), "release", 8),
)
# Returns the value before the addition.
add_shared = operation(
    types.int64,
    (types.intp, types.intp, types.int64),
    lambda b, v: b.atomic_rmw("add", _at(b, v[0], v[1], _LONG), v[2], "acq_rel"),
)
