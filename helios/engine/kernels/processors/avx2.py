"""x86-64 with AVX2: 16 registers of 8 lanes."""

from helios.engine.kernels.processors.target import Target

# The psABI's level x86-64-v3, as far as LLVM finds its features.
FEATURES = frozenset(
    {"avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sahf"}
)

AVX2 = Target("avx2", "x86-64-v3", (), FEATURES, block_rows=2)
