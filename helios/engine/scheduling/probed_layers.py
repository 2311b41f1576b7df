"""The first layers of a prompt's first tokens, kept from its probe until its prefill."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ProbedLayers:
    """What one model computed. Nothing in it depends on the depth at which the prompt is served."""

    # Equal for the same weights (`PackedWeights.id`).
    weights_id: str
    # Number of layers.
    layers: int
    # After these layers: [tokens, hidden].
    states: torch.Tensor
    # The prober keeps their KV in this slot.
    slot: int
