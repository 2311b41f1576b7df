"""The exponential function of float32 lanes."""

import math

import numpy as np

from helios.engine.kernels.jit import compiled
from helios.engine.kernels.simd import (
    floor,
    larger,
    multiply,
    multiply_add,
    power_of_two,
    spread_single,
    subtract,
)

_LOG2_E = math.log2(math.e)
# 2**x on [0, 1): the polynomial of this degree that begins with 1 and has the smallest largest error, to the
# precision of float32.
_POLYNOMIAL = (
    1.0,
    0.693151311811565,
    0.24016445010333062,
    0.0557999132318772,
    0.009017030192291614,
    0.0018671301166728997,
)


@compiled
def exponential(x):
    """e to the power of each lane. No lane may be positive."""
    power = multiply(larger(x, spread_single(np.float32(-87))), spread_single(np.float32(_LOG2_E)))
    whole = floor(power)
    part = subtract(power, whole)
    value = spread_single(np.float32(_POLYNOMIAL[5]))
    value = multiply_add(value, part, spread_single(np.float32(_POLYNOMIAL[4])))
    value = multiply_add(value, part, spread_single(np.float32(_POLYNOMIAL[3])))
    value = multiply_add(value, part, spread_single(np.float32(_POLYNOMIAL[2])))
    value = multiply_add(value, part, spread_single(np.float32(_POLYNOMIAL[1])))
    value = multiply_add(value, part, spread_single(np.float32(_POLYNOMIAL[0])))
    return multiply(value, power_of_two(whole))
