"""Exit modes and precisions: names that every part of Helios shares."""

import enum
from typing import Literal, TypeAlias


class ExitMode(enum.StrEnum):
    """How tokens leave the model.

    full: all layers. greedy: only the first d layers, and every token is read out at d (the HELIOS way).
    dynamic: all layers are loaded, and each token is read out at its own exit (the baseline).
    """

    FULL = "full"
    DYNAMIC = "dynamic"
    GREEDY = "greedy"


class Precision(enum.StrEnum):
    """The number format of products.

    auto: int8 on a CPU with fast byte products (AVX-512 VNNI), float32 on other CPUs, bfloat16 on a GPU. On a
    CPU everything between products is float32. int8: weights have one scale per output channel, activations
    have one per token. float16: computed by torch, which is slow on a CPU.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


# The same names for settings. With the enums, the help would show the members in capitals.
ExitModeName: TypeAlias = Literal["full", "dynamic", "greedy"]
PrecisionName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16", "int8"]
