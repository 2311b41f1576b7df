"""A loaded partial model: its weights, and the backend chosen at loading to compute with them."""

from collections.abc import Mapping
from typing import Protocol

import torch

from helios.architectures.spec import ModelConfig
from helios.engine.backends.burst import Burst
from helios.engine.backends.compiled import CompiledModel
from helios.engine.backends.eager import EagerModel
from helios.engine.backends.kv_cache import KVCache, kv_dtype
from helios.engine.backends.paged_attention import attends_in_place
from helios.engine.backends.readout import Readout
from helios.engine.scheduling.batch import Batch
from helios.engine.weights.packed_weights import PackedWeights
from helios.modes import Precision


class Backend(Protocol):
    """Computes a model's steps: `CompiledModel` with one call each, `EagerModel` with torch.

    `burst` has more than one step only if the model has bursts (`Model.has_bursts`). The block tables then
    include the blocks of all tokens of the burst. The logits are those of the last step; all other results
    cover all steps in order. On a CPU a readout is valid until the next call.
    """

    def step(self, batch: Batch, cache: KVCache, depth: int, burst: Burst, /) -> Readout:
        """Reads out the read rows after the first `depth` layers. Writes the KV of all rows."""

    def step_with_states(self, batch: Batch, cache: KVCache, depth: int, /) -> tuple[Readout, torch.Tensor]:
        """Like `step`. Also returns the states of all rows after these layers: [T, hidden]."""

    def step_dynamic(
        self, batch: Batch, cache: KVCache, thresholds: Mapping[int, float], burst: Burst, /
    ) -> tuple[Readout, list[int]]:
        """Runs all layers. A decode row leaves at the first exit whose threshold it reaches.

        Returns the readout of the read rows and the exit layer of each.
        """

    def layers(
        self, hidden: torch.Tensor, batch: Batch, cache: KVCache, first: int, last: int, /
    ) -> torch.Tensor:
        """Runs the layers first..last: [T, hidden] -> [T, hidden]. Writes the rows' KV."""


class Model:
    """A partial model: embeddings, `depth` layers, their exit heads and the LM head."""

    def __init__(self, config: ModelConfig, weights: PackedWeights, block_tokens: int) -> None:
        """block_tokens: tokens per block of the caches that it will use."""
        self.config, self.block_tokens = config, block_tokens
        # Another plan of the same checkpoint may share these weights.
        self.weights = weights
        self.depth = len(weights.layers)
        # The precision of its products.
        self.precision = weights.precision
        self.device = weights.ends.device
        # Type of keys and values.
        self.kv_dtype = kv_dtype(Precision(self.precision), self.device)
        self._eager = EagerModel(config, weights, block_tokens)
        compiled = None
        if attends_in_place(config, self.device, block_tokens):
            compiled = CompiledModel.of(config, weights)
        # Whether the backend can take several steps in one call and draw tokens.
        self.has_bursts = compiled is not None
        self.backend: Backend = compiled or self._eager

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations."""
        return self._eager.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all loaded weights. Shared tensors count once."""
        return self.weights.weight_bytes

    # The parts of a step, for callers that need the hidden states in between.

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer: [T] -> [T, hidden]."""
        return self._eager.embed(token_ids, positions)

    def layers(
        self, first: int, last: int, hidden: torch.Tensor, batch: Batch, cache: KVCache
    ) -> torch.Tensor:
        """Runs the layers first..last: [T, hidden] -> [T, hidden]. Writes the rows' KV."""
        return self.backend.layers(hidden, batch, cache, first, last)

    def read_out(self, hidden: torch.Tensor, exit_layer: int) -> torch.Tensor:
        """Logits at the exit after `exit_layer` layers: [rows, hidden] -> [rows, vocabulary]."""
        return self._eager.read_out(hidden, exit_layer)
