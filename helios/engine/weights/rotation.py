"""The angles of rotary positions, computed as in transformers, so that both round alike."""

import math

import torch

from helios.architectures.spec import LinearScaling, Llama3Scaling, ModelConfig, RotaryPositions


def rotation(config: ModelConfig, device: torch.device) -> torch.Tensor | None:
    """Cosines, then sines, of each position's angles: float32 [context, head_dim].

    None: positions are not rotary.
    """
    if not isinstance(config.positions, RotaryPositions):
        return None
    places = torch.arange(config.context_tokens, dtype=torch.float32, device=device)
    # [context, head_dim / 2]
    angles = places[:, None] * frequencies(config.positions, config.head_dim).to(device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def frequencies(positions: RotaryPositions, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions: float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    found = 1.0 / (positions.theta**exponents)
    scaling = positions.scaling
    if isinstance(scaling, LinearScaling):
        return found / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _scaled_like_llama3(found, scaling)
    return found


def _scaled_like_llama3(found: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    lengths = 2 * math.pi / found
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    periods = scaling.original_context / lengths
    part = (periods - low) / (high - low)
    between = (1 - part) * found / scaling.factor + part * found
    scaled = torch.where(lengths > scaling.original_context / low, found / scaling.factor, between)
    return torch.where(lengths < scaling.original_context / high, found, scaled)
