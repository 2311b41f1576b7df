"""Computes from held-out text what serving needs: a confidence threshold per exit, and a default depth."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from helios.calibration import TARGET_AGREEMENT, calibrated_threshold
from training.exit_reader import ExitFacts

DEPTH_TOLERANCE = 1.05  # largest ratio of an exit's perplexity to the last layer's


def calibrate_threshold(confidence: Tensor, agrees: Tensor, target: float = TARGET_AGREEMENT) -> float:
    """The lowest threshold such that at least `target` of the tokens above it agree with the last layer.

    confidence: [tokens] in 0..1; agrees: [tokens] bool. Returns 1.0 when there is no such confidence.
    """
    levels, level_of = confidence.unique(return_inverse=True)
    counts = torch.bincount(level_of, minlength=len(levels))
    agreements = torch.bincount(level_of[agrees], minlength=len(levels))
    return calibrated_threshold(levels.tolist(), counts.tolist(), agreements.tolist(), target)


def calibrate_thresholds(facts: Mapping[int, ExitFacts]) -> dict[int, float]:
    """The threshold of every exit. The last layer's is 0, because every token may leave there."""
    *early, last = sorted(facts)
    return {
        layer: calibrate_threshold(facts[layer].confidence, facts[layer].top == facts[last].top)
        for layer in early
    } | {last: 0.0}


def perplexity(facts: ExitFacts) -> float:
    """exp of the mean cross-entropy per token."""
    return math.exp(-facts.log_probability.mean().item())


def default_depth(facts: Mapping[int, ExitFacts]) -> int:
    """The smallest exit whose perplexity is within 5 % of the last layer's."""
    limit = DEPTH_TOLERANCE * perplexity(facts[max(facts)])
    return min(layer for layer, found in facts.items() if perplexity(found) <= limit)
