"""x86-64 with AVX-512: 32 registers of 16 lanes. Some have dot products of bytes (VNNI) and of bfloat16."""

from llvmlite import ir

from helios.engine.kernels.processors import avx2
from helios.engine.kernels.processors.target import Target
from helios.engine.kernels.simd import LANES, SINGLES, WORDS, Builder, Value, build_call

_VNNI, _BF16 = "avx512vnni", "avx512bf16"
# The level x86-64-v4 of the psABI, limited to features that LLVM reports.
_FEATURES = avx2.FEATURES | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BLOCK_ROWS = 8


class _BFloat16(ir.types.Type):
    """LLVM's bfloat16 type, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_BFLOATS = ir.VectorType(_BFloat16(), 2 * LANES)


def _bytes(builder: Builder, sums: Value, row: Value, channels: Value) -> Value:
    return build_call("llvm.x86.avx512.vpdpbusd.512", WORDS)(builder, [sums, row, channels])


def _bfloat16(builder: Builder, sums: Value, row: Value, channels: Value) -> Value:
    parts = [builder.bitcast(part, _BFLOATS) for part in (row, channels)]
    return build_call("llvm.x86.avx512bf16.dpbf16ps.512", SINGLES)(builder, [sums, *parts])


AVX512 = Target("avx512", "x86-64-v4", (), _FEATURES, _BLOCK_ROWS)
AVX512_VNNI = Target(
    "avx512-vnni", "x86-64-v4", (_VNNI,), _FEATURES | {_VNNI}, _BLOCK_ROWS, byte_dot_product=_bytes
)
AVX512_BF16 = Target(
    "avx512-bf16",
    "x86-64-v4",
    (_VNNI, _BF16),
    _FEATURES | {_VNNI, _BF16},
    _BLOCK_ROWS,
    byte_dot_product=_bytes,
    bfloat16_dot_product=_bfloat16,
)
