"""Exit modes and precisions: names that every part of Helios shares."""

import enum
from typing import Literal, TypeAlias


class ExitMode(enum.StrEnum):
    """How tokens leave the model.

    full: all layers. greedy: the first d layers, every token read out at d (the HELIOS way).
    dynamic: all layers loaded, each token read out at its own exit (the baseline).
    """

    FULL = "full"
    DYNAMIC = "dynamic"
    GREEDY = "greedy"


class Precision(enum.StrEnum):
    """The numbers that products are computed in.

    auto: int8 on a CPU that multiplies bytes fast (AVX-512 VNNI), float32 on other CPUs, bfloat16 on a GPU.
    On a CPU everything between products is computed in float32. int8: weights have a scale per output
    channel, activations a scale per token. float16: computed by torch, which is slow on a CPU.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


# The same names for settings, whose help would show an enum's members in capitals.
ExitModeName: TypeAlias = Literal["full", "dynamic", "greedy"]
PrecisionName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16", "int8"]
