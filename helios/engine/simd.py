"""Vectors of 16 lanes for kernels compiled by Numba: the few operations that these need, as LLVM code.

Addresses are integers (`Tensor.data_ptr`), indices count elements, and nothing is checked: only
`helios.engine.kernels` calls these. LLVM splits the vectors on processors with narrower registers. The one
operation that a processor must have to be fast is the dot product of bytes (AVX-512 VNNI); elsewhere
the same sums are computed from wider products.

Numba keeps compiled kernels by the time of their own file: after a change here, touch `kernels.py` too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_BYTE, _SHORT, _WORD, _SINGLE = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_WORDS, _SINGLES = ir.VectorType(_WORD, LANES), ir.VectorType(_SINGLE, LANES)

Builder = Any  # llvmlite's ir.IRBuilder, which is untyped
Value = Any


def has_byte_dot_product() -> bool:
    """Whether this processor multiplies and sums bytes in one instruction (AVX-512 VNNI)."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512f"))


class VectorType(types.Type):
    """16 lanes in a register."""

    def __init__(self, name: str, lanes: Any) -> None:
        super().__init__(name=name)
        self.lanes = lanes


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: VectorType) -> None:
        super().__init__(manager, kind, kind.lanes)


words = VectorType("words16", _WORDS)  # int32
singles = VectorType("singles16", _SINGLES)  # float32


def _operation(
    result: types.Type, arguments: Sequence[types.Type], build: Callable[[Builder, Sequence[Value]], Value]
) -> Any:
    """An intrinsic of fixed types out of the code that builds it."""
    signature = result(*arguments)

    def generate(context: Any, builder: Builder, _: Any, values: Sequence[Value]) -> Value:
        made = build(builder, values)
        return context.get_dummy_value() if result is types.void else made

    # Numba takes the number of arguments from the function's own.
    by_arguments = (
        lambda _typing: (signature, generate),
        lambda _typing, _a: (signature, generate),
        lambda _typing, _a, _b: (signature, generate),
        lambda _typing, _a, _b, _c: (signature, generate),
        lambda _typing, _a, _b, _c, _d: (signature, generate),
    )
    return intrinsic(by_arguments[len(arguments)])


def _at(builder: Builder, address: Value, index: Value, element: Any, kind: Any = None) -> Value:
    """Pointer to `kind` at element `index` from an address."""
    pointer = builder.inttoptr(address, element.as_pointer())
    pointer = builder.gep(pointer, [index])
    return pointer if kind is None else builder.bitcast(pointer, kind.as_pointer())


def _load(element: Any, kind: Any = None) -> Callable[[Builder, Sequence[Value]], Value]:
    def build(builder: Builder, values: Sequence[Value]) -> Value:
        loaded = builder.load(_at(builder, values[0], values[1], element, kind))
        loaded.align = element.width // 8 if isinstance(element, ir.IntType) else 4
        return loaded

    return build


def _store(element: Any, kind: Any = None) -> Callable[[Builder, Sequence[Value]], Value]:
    def build(builder: Builder, values: Sequence[Value]) -> Value:
        stored = builder.store(values[2], _at(builder, values[0], values[1], element, kind))
        stored.align = element.width // 8 if isinstance(element, ir.IntType) else 4
        return stored

    return build


def _spread(builder: Builder, value: Value, lanes: Any) -> Value:
    """The same value in every lane."""
    nothing = ir.Constant(lanes, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_WORDS, [0] * LANES))


def _call(name: str, lanes: Any) -> Callable[[Builder, Sequence[Value]], Value]:
    def build(builder: Builder, values: Sequence[Value]) -> Value:
        kind = ir.FunctionType(lanes, [value.type for value in values])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)

    return build


def _byte_dot_product(builder: Builder, values: Sequence[Value]) -> Value:
    """Lane i: sum + the dot product of bytes 4i..4i+3, unsigned of the one and signed of the other."""
    if has_byte_dot_product():
        return _call("llvm.x86.avx512.vpdpbusd.512", _WORDS)(builder, values)
    total, unsigned, signed = values
    for shift in (0, 8, 16, 24):
        left = builder.and_(
            builder.lshr(unsigned, ir.Constant(_WORDS, [shift] * LANES)), ir.Constant(_WORDS, [255] * LANES)
        )
        right = builder.ashr(
            builder.shl(signed, ir.Constant(_WORDS, [24 - shift] * LANES)),
            ir.Constant(_WORDS, [24] * LANES),
        )
        total = builder.add(total, builder.mul(left, right))
    return total


def _sum(builder: Builder, values: Sequence[Value]) -> Value:
    """All lanes added in a fixed order: halves onto each other."""
    vector = values[0]
    for half in (8, 4, 2, 1):
        order = [*range(half, 2 * half), *([0] * (LANES - half))]
        moved = builder.shuffle_vector(vector, vector, ir.Constant(_WORDS, order))
        vector = builder.fadd(vector, moved)
    return builder.extract_element(vector, ir.Constant(_WORD, 0))


def _largest(builder: Builder, values: Sequence[Value]) -> Value:
    vector = values[0]
    for half in (8, 4, 2, 1):
        order = [*range(half, 2 * half), *([0] * (LANES - half))]
        moved = builder.shuffle_vector(vector, vector, ir.Constant(_WORDS, order))
        vector = _call("llvm.maxnum.v16f32", _SINGLES)(builder, [vector, moved])
    return builder.extract_element(vector, ir.Constant(_WORD, 0))


# Scalars at (address, index).
load_single = _operation(types.float32, (types.intp, types.intp), _load(_SINGLE))
store_single = _operation(types.void, (types.intp, types.intp, types.float32), _store(_SINGLE))
load_long = _operation(types.int64, (types.intp, types.intp), _load(ir.IntType(64)))
store_long = _operation(types.void, (types.intp, types.intp, types.int64), _store(ir.IntType(64)))
store_byte = _operation(types.void, (types.intp, types.intp, types.uint8), _store(_BYTE))

# Vectors from and to (address, index); `spread_*` fill all lanes with one value.
load_singles = _operation(singles, (types.intp, types.intp), _load(_SINGLE, _SINGLES))
store_singles = _operation(types.void, (types.intp, types.intp, singles), _store(_SINGLE, _SINGLES))
load_words = _operation(words, (types.intp, types.intp), _load(_WORD, _WORDS))
spread_single = _operation(singles, (types.float32,), lambda b, v: _spread(b, v[0], _SINGLES))
# The 4 bytes at (address, index of byte) in every lane.
spread_bytes = _operation(
    words,
    (types.intp, types.intp),
    lambda b, v: _spread(b, _load(_BYTE, _WORD)(b, v), _WORDS),
)


def _store_bytes(builder: Builder, values: Sequence[Value]) -> Value:
    """Each lane, a whole number of 0 to 255, as a byte."""
    octets = ir.VectorType(_BYTE, LANES)
    narrow = builder.trunc(builder.fptosi(values[2], _WORDS), octets)
    return _store(_BYTE, octets)(builder, [values[0], values[1], narrow])


store_bytes = _operation(types.void, (types.intp, types.intp, singles), _store_bytes)
round_to_even = _operation(singles, (singles,), _call("llvm.rint.v16f32", _SINGLES))
no_words = _operation(words, (), lambda _b, _v: ir.Constant(_WORDS, [0] * LANES))
no_singles = _operation(singles, (), lambda _b, _v: ir.Constant(_SINGLES, [0.0] * LANES))
# 64 signed bytes at (address, index of byte).
load_bytes = _operation(words, (types.intp, types.intp), _load(_BYTE, _WORDS))

byte_dot_product = _operation(words, (words, words, words), _byte_dot_product)
add_words = _operation(words, (words, words), lambda b, v: b.add(*v))
subtract_words = _operation(words, (words, words), lambda b, v: b.sub(*v))
to_singles = _operation(singles, (words,), lambda b, v: b.sitofp(v[0], _SINGLES))
add = _operation(singles, (singles, singles), lambda b, v: b.fadd(*v))
subtract = _operation(singles, (singles, singles), lambda b, v: b.fsub(*v))
multiply = _operation(singles, (singles, singles), lambda b, v: b.fmul(*v))
multiply_add = _operation(singles, (singles, singles, singles), _call("llvm.fma.v16f32", _SINGLES))
larger = _operation(singles, (singles, singles), _call("llvm.maxnum.v16f32", _SINGLES))
absolute = _operation(singles, (singles,), _call("llvm.fabs.v16f32", _SINGLES))
floor = _operation(singles, (singles,), _call("llvm.floor.v16f32", _SINGLES))
total = _operation(types.float32, (singles,), _sum)
largest = _operation(types.float32, (singles,), _largest)

# 0 to 15, and the same number in all lanes.
lane_numbers = _operation(words, (), lambda _b, _v: ir.Constant(_WORDS, list(range(LANES))))
spread_word = _operation(words, (types.int32,), lambda b, v: _spread(b, v[0], _WORDS))
store_words = _operation(types.void, (types.intp, types.intp, words), _store(_WORD, _WORDS))
# Lane by lane, c where a > b, else d.
where_greater = _operation(
    words,
    (singles, singles, words, words),
    lambda b, v: b.select(b.fcmp_ordered(">", v[0], v[1]), v[2], v[3]),
)


def _power_of_two(builder: Builder, values: Sequence[Value]) -> Value:
    """2 to a whole number, out of the bits of a float's exponent."""
    number = builder.fptosi(values[0], _WORDS)
    biased = builder.add(number, ir.Constant(_WORDS, [127] * LANES))
    return builder.bitcast(builder.shl(biased, ir.Constant(_WORDS, [23] * LANES)), _SINGLES)


power_of_two = _operation(singles, (singles,), _power_of_two)


# Counts that threads share, at (address, index).
_LONG = ir.IntType(64)
load_shared = _operation(
    types.int64,
    (types.intp, types.intp),
    lambda b, v: b.load_atomic(_at(b, v[0], v[1], _LONG), "acquire", 8),
)
store_shared = _operation(
    types.void,
    (types.intp, types.intp, types.int64),
    lambda b, v: b.store_atomic(v[2], _at(b, v[0], v[1], _LONG), "release", 8),
)
# Returns what was there before.
add_shared = _operation(
    types.int64,
    (types.intp, types.intp, types.int64),
    lambda b, v: b.atomic_rmw("add", _at(b, v[0], v[1], _LONG), v[2], "acq_rel"),
)
