"""The processor that kernels are compiled for: a class of processors, not this very one.

Numba keeps machine code by the name and the features of the host's processor, which differ between any two
machines of a cloud. Kernels distinguish few features, so they are compiled for classes instead: what one
machine compiles, an image for example, serves all others of the class. HELIOS_KERNEL_TARGET names another
class, whose code can be compiled here but perhaps not run, or `host`: exactly this processor.
"""

import os
from dataclasses import dataclass

import llvmlite.binding
from numba.core import config

from helios.errors import SettingsError

VARIABLE = "HELIOS_KERNEL_TARGET"
HOST = "host"


@dataclass(frozen=True, slots=True)
class Target:
    """A class of processors. cpu: LLVM's name for what it is based on; features: what it has beyond that."""

    name: str
    cpu: str
    features: tuple[str, ...]
    # What LLVM must find in a processor of the class.
    needs: frozenset[str]


# The psABI's levels of x86-64, as far as LLVM finds their features.
_V3 = frozenset({"avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sahf"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI, _BF16 = "avx512vnni", "avx512bf16"

# The most able first: a processor belongs to the first whose needs it meets.
TARGETS = (
    Target("avx512-bf16", "x86-64-v4", (_VNNI, _BF16), _V4 | {_VNNI, _BF16}),
    Target("avx512-vnni", "x86-64-v4", (_VNNI,), _V4 | {_VNNI}),
    Target("avx512", "x86-64-v4", (), _V4),
    Target("avx2", "x86-64-v3", (), _V3),
)


def _host_features() -> frozenset[str]:
    features = llvmlite.binding.get_host_cpu_features()
    return frozenset(name for name, is_there in features.items() if is_there)


def _choose(name: str) -> Target | None:
    """The class of that name; without one that of this machine, None if it is in no class.

    Raises SettingsError for an unknown name.
    """
    if name == HOST:
        return None
    by_name = {target.name: target for target in TARGETS}
    if name:
        if name not in by_name:
            raise SettingsError(f"{VARIABLE} is {name!r}; use one of {', '.join(by_name)}, {HOST}")
        return by_name[name]
    features = _host_features()
    return next((target for target in TARGETS if target.needs <= features), None)


# None: exactly this processor, as Numba describes it.
TARGET = _choose(os.environ.get(VARIABLE, ""))
_FEATURES = _host_features() if TARGET is None else TARGET.needs
if TARGET is not None:
    # Numba reads them when it compiles for the first time.
    config.CPU_NAME = TARGET.cpu  # type: ignore[attr-defined]
    config.CPU_FEATURES = ",".join(f"+{feature}" for feature in TARGET.features)  # type: ignore[attr-defined]


def has_long_registers() -> bool:
    """Whether kernels find 32 registers of 16 lanes (AVX-512)."""
    return _has("avx512f")


def has_byte_dot_product() -> bool:
    """Whether kernels multiply and sum bytes in one instruction (AVX-512 VNNI)."""
    return _has(_VNNI)


def has_bfloat16_dot_product() -> bool:
    """Whether kernels multiply and sum bfloat16 in one instruction (AVX-512 BF16)."""
    return _has(_BF16)


def _has(feature: str) -> bool:
    return {feature, "avx512f"} <= _FEATURES
