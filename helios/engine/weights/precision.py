"""In which numbers a model computes."""

import enum

import torch

from helios.engine.kernels.processor import has_byte_dot_product
from helios.errors import SettingsError


class Precision(enum.StrEnum):
    """auto: int8 on a CPU that multiplies bytes fast (AVX-512 VNNI), float32 on others, bfloat16 on a GPU.

    On a CPU products are computed in it, and all between them in float32. int8: weights with a scale
    per output channel, activations with a scale per token. float16: torch's products, on a CPU slow ones.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"

    def on(self, device: torch.device) -> "Precision":
        """What is computed in on `device`. Raises SettingsError when it cannot."""
        if self is Precision.AUTO:
            if device.type != "cpu":
                return Precision.BFLOAT16
            return Precision.INT8 if has_byte_dot_product() else Precision.FLOAT32
        if self is Precision.INT8 and device.type != "cpu":
            raise SettingsError(f"int8 is for CPUs; use bfloat16 on {device}")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read from a checkpoint; in int8 before it is quantised."""
        chosen = Precision.FLOAT32 if self is Precision.INT8 else self
        found = getattr(torch, chosen.value)
        assert isinstance(found, torch.dtype)
        return found
