"""The processor that kernels are compiled for: a class of processors, not the exact one of this machine.

Numba caches machine code by the name and the features of the host's processor, which often differ between two
machines of a cloud. Kernels distinguish only a few features, so they are compiled for classes instead.
Machine code from one machine, such as an image build, then works on all others of the class.
HELIOS_KERNEL_TARGET names another class, whose code can be compiled here but may not run here, or `host`:
exactly this processor.
"""

import os

import llvmlite.binding
from numba.core import config

from helios.engine.kernels.processors.avx2 import AVX2
from helios.engine.kernels.processors.avx512 import AVX512, AVX512_BF16, AVX512_VNNI
from helios.engine.kernels.processors.target import Target
from helios.errors import SettingsError

VARIABLE = "HELIOS_KERNEL_TARGET"
HOST = "host"

# The most capable class comes first. A processor belongs to the first class whose needs it meets.
TARGETS = (AVX512_BF16, AVX512_VNNI, AVX512, AVX2)
# For processors in no class: LLVM compiles the kernels with the features that it finds.
_ANY = Target("any", "", (), frozenset(), block_rows=2)


def check() -> None:
    """Raises SettingsError when HELIOS_KERNEL_TARGET names no class."""
    known = [*(target.name for target in TARGETS), HOST]
    if _NAME and _NAME not in known:
        raise SettingsError(f"{VARIABLE} is {_NAME!r}; use one of {', '.join(known)}")


def has_byte_dot_product() -> bool:
    """Whether one instruction multiplies and sums bytes."""
    return PROCESSOR.byte_dot_product is not None


def _class_of_host() -> Target | None:
    """The class of this machine's processor. None if it is in no class."""
    features = {name for name, is_there in llvmlite.binding.get_host_cpu_features().items() if is_there}
    return next((target for target in TARGETS if target.needs <= features), None)


# `check` reports an unknown name, because there a caller can handle the error.
_NAME = os.environ.get(VARIABLE, "")
_OF_HOST = _class_of_host()
# None: exactly this processor, as Numba describes it.
TARGET = None if _NAME == HOST else next((one for one in TARGETS if one.name == _NAME), _OF_HOST)
# The processor for which kernels are built.
PROCESSOR = TARGET or _OF_HOST or _ANY
if TARGET is not None:
    # Numba reads these settings when it compiles for the first time.
    config.CPU_NAME = TARGET.cpu  # type: ignore[attr-defined]
    config.CPU_FEATURES = ",".join(f"+{feature}" for feature in TARGET.features)  # type: ignore[attr-defined]
