"""A loaded partial model: its weights, and the backend that computes with them, chosen when it is loaded."""

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
    """What computes a model's steps: `CompiledModel` in one call each, `EagerModel` with torch.

    `burst` is more than one step only where the model has bursts (`Model.has_bursts`); the tables then have
    the blocks of all its tokens. Of several steps the logits are those of the last, and everything else is of
    all steps, one after the other. On a CPU a readout is valid until the next call.
    """

    def step(self, batch: Batch, cache: KVCache, depth: int, burst: Burst, /) -> Readout:
        """The readout of the read rows after the first `depth` layers; writes the KV of all rows."""

    def step_dynamic(
        self, batch: Batch, cache: KVCache, thresholds: Mapping[int, float], burst: Burst, /
    ) -> tuple[Readout, list[int]]:
        """All layers; decode rows leave at the first exit where they reach its threshold.

        Returns the readout of the read rows, and the exit layer of each.
        """

    def layers(
        self, hidden: torch.Tensor, batch: Batch, cache: KVCache, first: int, last: int, /
    ) -> torch.Tensor:
        """The layers first..last: [T, hidden] -> [T, hidden]. Writes the rows' KV."""


class Model:
    """A partial model: embeddings, `depth` layers, the exit heads among them and the LM head."""

    def __init__(self, config: ModelConfig, weights: PackedWeights, block_tokens: int) -> None:
        """block_tokens: of the caches that it will work on."""
        self.config, self.block_tokens = config, block_tokens
        # Another plan of the same checkpoint may share them.
        self.weights = weights
        self.depth = len(weights.layers)
        # What its products are computed in.
        self.precision = weights.precision
        self.device = weights.ends.embed_positions.device
        # Of keys and values.
        self.kv_dtype = kv_dtype(Precision(self.precision), self.device)
        self._eager = EagerModel(config, weights, block_tokens)
        compiled = None
        if attends_in_place(self.device, config.head_dim, block_tokens):
            compiled = CompiledModel.of(config, weights)
        # Whether the backend takes several steps at once, and draws tokens.
        self.has_bursts = compiled is not None
        self.backend: Backend = compiled or self._eager

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self._eager.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all loaded weights, shared ones once."""
        return self.weights.weight_bytes

    # What a step consists of, for those who look at the states between.

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer: [T] -> [T, hidden]."""
        return self._eager.embed(token_ids, positions)

    def layers(
        self, first: int, last: int, hidden: torch.Tensor, batch: Batch, cache: KVCache
    ) -> torch.Tensor:
        """The layers first..last: [T, hidden] -> [T, hidden]. Writes the rows' KV."""
        return self.backend.layers(hidden, batch, cache, first, last)

    def read_out(self, hidden: torch.Tensor, exit_layer: int) -> torch.Tensor:
        """Logits at the exit after `exit_layer` layers: [rows, hidden] -> [rows, vocabulary]."""
        return self._eager.read_out(hidden, exit_layer)
