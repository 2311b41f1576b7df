"""Resolves a precision for a device."""

import torch

from helios.engine.kernels.processor import has_byte_dot_product
from helios.errors import SettingsError
from helios.modes import Precision


def precision_on(precision: Precision, device: torch.device) -> Precision:
    """The precision on `device`, never auto. Raises SettingsError when the device does not support it."""
    if precision is Precision.AUTO:
        if device.type != "cpu":
            return Precision.BFLOAT16
        return Precision.INT8 if has_byte_dot_product() else Precision.FLOAT32
    if precision is Precision.INT8 and device.type != "cpu":
        raise SettingsError(f"int8 is for CPUs; use bfloat16 on {device}")
    return precision


def checkpoint_dtype(precision: Precision) -> torch.dtype:
    """The type in which a checkpoint is read. int8 weights are read in float32, then quantised."""
    chosen = Precision.FLOAT32 if precision is Precision.INT8 else precision
    found = getattr(torch, chosen.value)
    assert isinstance(found, torch.dtype)
    return found
