"""x86-64 with AVX2: 16 registers of 8 lanes."""

from helios.engine.kernels.processors.target import Target

# The level x86-64-v3 of the psABI, limited to features that LLVM reports.
FEATURES = frozenset(
    {"avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sahf"}
)

AVX2 = Target("avx2", "x86-64-v3", (), FEATURES, block_rows=2)
