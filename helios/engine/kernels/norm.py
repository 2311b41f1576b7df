"""Norms of rows of states."""

import numpy as np

from helios.engine.kernels.jit import compiled
from helios.engine.kernels.layout import RMS_NORM
from helios.engine.kernels.simd import (
    LANES,
    add,
    load_single,
    load_singles,
    load_some,
    multiply,
    multiply_add,
    no_singles,
    spread_single,
    store_single,
    store_singles,
    store_some,
    subtract,
    total,
)


@compiled
def norm(model, parameters, x, start, end, out):
    """Applies the model's norm to rows start..end of x, float32 [rows, model.width]. out may be x."""
    width = model.width
    if model.norm == RMS_NORM:
        for row in range(start, end):
            rms_norm(x + 4 * row * width, width, model.epsilon, parameters.weight, out + 4 * row * width)
    else:
        _layer_norm(x, start, end, width, model.epsilon, parameters.weight, parameters.bias, out)


@compiled
def rms_norm(x, width, epsilon, weight, out):
    """RMS norm of a vector, float32 [width] (Zhang and Sennrich 2019). out may be x."""
    whole = width - width % LANES
    part = load_some(x, whole, width - whole)
    sums = multiply(part, part)
    for column in range(0, whole, LANES):
        value = load_singles(x, column)
        sums = multiply_add(value, value, sums)
    inverse = np.float32(1) / np.sqrt(total(sums) / np.float32(width) + epsilon)
    inverses = spread_single(inverse)
    for column in range(0, whole, LANES):
        value = multiply(load_singles(x, column), inverses)
        store_singles(out, column, multiply(value, load_singles(weight, column)))
    part = multiply(multiply(part, inverses), load_some(weight, whole, width - whole))
    store_some(out, whole, width - whole, part)


@compiled
def _layer_norm(x, start, end, width, epsilon, weight, bias, out):
    """Layer norm (Ba et al. 2016)."""
    whole = width - width % LANES
    for row in range(start, end):
        base = row * width
        sums = no_singles()
        for column in range(0, whole, LANES):
            sums = add(sums, load_singles(x, base + column))
        mean = total(sums)
        for column in range(whole, width):
            mean += load_single(x, base + column)
        mean /= np.float32(width)
        means = spread_single(mean)
        sums = no_singles()
        for column in range(0, whole, LANES):
            difference = subtract(load_singles(x, base + column), means)
            sums = multiply_add(difference, difference, sums)
        variance = total(sums)
        for column in range(whole, width):
            single = load_single(x, base + column) - mean
            variance += single * single
        inverse = np.float32(1) / np.sqrt(variance / np.float32(width) + epsilon)
        inverses = spread_single(inverse)
        for column in range(0, whole, LANES):
            value = multiply(subtract(load_singles(x, base + column), means), inverses)
            value = multiply_add(value, load_singles(weight, column), load_singles(bias, column))
            store_singles(out, base + column, value)
        for column in range(whole, width):
            scaled = (load_single(x, base + column) - mean) * inverse
            store_single(out, base + column, scaled * load_single(weight, column) + load_single(bias, column))
