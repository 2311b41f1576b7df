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
# 2**x on [0, 1): the Taylor series in x ln 2, to the precision of float32.
_SERIES = tuple(math.log(2) ** power / math.factorial(power) for power in range(8))


@compiled
def exponential(x):
    """e to the power of each lane. No lane may be positive."""
    power = multiply(larger(x, spread_single(np.float32(-87))), spread_single(np.float32(_LOG2_E)))
    whole = floor(power)
    part = subtract(power, whole)
    value = spread_single(np.float32(_SERIES[7]))
    value = multiply_add(value, part, spread_single(np.float32(_SERIES[6])))
    value = multiply_add(value, part, spread_single(np.float32(_SERIES[5])))
    value = multiply_add(value, part, spread_single(np.float32(_SERIES[4])))
    value = multiply_add(value, part, spread_single(np.float32(_SERIES[3])))
    value = multiply_add(value, part, spread_single(np.float32(_SERIES[2])))
    value = multiply_add(value, part, spread_single(np.float32(_SERIES[1])))
    value = multiply_add(value, part, spread_single(np.float32(_SERIES[0])))
    return multiply(value, power_of_two(whole))
