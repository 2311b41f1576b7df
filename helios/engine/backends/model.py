"""The first layers of a model over paged KV, in the form that its config describes."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from helios.architectures.spec import ModelConfig
from helios.engine.backends.burst import ONE_STEP, Burst
from helios.engine.backends.compiled import CompiledModel
from helios.engine.backends.kv_cache import KVCache, kv_dtype
from helios.engine.backends.paged_attention import attend, reads_in_place
from helios.engine.backends.readout import Readout, read
from helios.engine.scheduling.batch import Batch
from helios.engine.weights.linear import PackedLinear
from helios.engine.weights.packed_weights import Head, PackedWeights
from helios.engine.weights.parts import Norm
from helios.modes import Precision

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Model:
    """A partial model: embeddings, `depth` layers, the exit heads among them and the LM head."""

    def __init__(self, config: ModelConfig, weights: PackedWeights) -> None:
        self.config = config
        # Another plan of the same weights may share them.
        self.weights = weights
        self.depth = len(weights.layers)
        # Numbers that its products are computed in.
        self.precision = weights.precision
        ends = weights.ends
        self.device = ends.embed_positions.device
        # Whether its products are compiled: then all between them is in float32.
        self.compiled = isinstance(ends.lm_head, PackedLinear)
        # Of activations.
        self.dtype = torch.float32 if self.compiled else ends.embed_positions.dtype
        # None: the rows of the LM head.
        self._embed_tokens, self._embed_positions = ends.embed_tokens, ends.embed_positions
        self._project_in, self._project_out, self._lm_head = ends.project_in, ends.project_out, ends.lm_head
        self._final = weights.final or Head(None, None)
        self._exits = weights.exits
        self._activation = _ACTIVATIONS[config.activation]
        self._layers = weights.layers
        # The step in one call, where its precision has one.
        self._compiled = CompiledModel.of(config, weights)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values."""
        return kv_dtype(Precision(self.precision), self.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all loaded weights, shared ones once."""
        return self.weights.weight_bytes

    def has_bursts(self, cache: KVCache) -> bool:
        """Whether `step` and `step_dynamic` can take several steps at once, and draw tokens."""
        return self._compiled_for(cache) is not None

    def step(self, batch: Batch, cache: KVCache, depth: int, burst: Burst = ONE_STEP) -> Readout:
        """What the batch's read rows read out after the first `depth` layers; writes the KV of all rows.

        burst: where the model has bursts; the tables have the blocks of all its tokens. Of several steps the
        logits are the last one's. On a CPU valid until the next call.
        """
        if (compiled := self._compiled_for(cache)) is not None:
            return compiled.step(batch, cache, depth, burst)
        hidden = self.layers(0, depth, self.embed(batch.token_ids, batch.positions), batch, cache)
        # Rows are read in their order: as many as there are, these are all.
        if batch.reads < batch.rows:
            hidden = hidden[batch.read_rows]
        return read(self.read_out(hidden, depth))

    def step_dynamic(
        self, batch: Batch, cache: KVCache, thresholds: Mapping[int, float], burst: Burst = ONE_STEP
    ) -> tuple[Readout, list[int]] | None:
        """Of all layers, with exits token by token (`exits.run_dynamic`); None where no compiled step can."""
        compiled = self._compiled_for(cache)
        return None if compiled is None else compiled.step_dynamic(batch, cache, thresholds, burst)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer: [T] -> [T, hidden]."""
        if self._embed_tokens is None:
            hidden = self._lm_head.weights_of(token_ids).to(self.dtype)
        else:
            hidden = F.embedding(token_ids, self._embed_tokens).to(self.dtype)
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        return hidden + F.embedding(positions + self.config.positions.offset, self._embed_positions)

    def layers(
        self, first: int, last: int, hidden: torch.Tensor, batch: Batch, cache: KVCache
    ) -> torch.Tensor:
        """The layers first..last: [T, hidden] -> [T, hidden]. Writes the rows' KV."""
        if (compiled := self._compiled_for(cache)) is not None:
            return compiled.layers(hidden, batch, cache, first, last)
        for index in range(first, last):
            hidden = self._layer(index, hidden, batch, cache)
        return hidden

    def _compiled_for(self, cache: KVCache) -> CompiledModel | None:
        """What computes on this cache in one call."""
        return self._compiled if reads_in_place(cache) and cache.dtype == self.kv_dtype else None

    def _layer(self, index: int, hidden: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        layer = self._layers[index]
        before = self.config.norm_before
        x = _norm(hidden, layer.attn_norm) if before else hidden
        attended = _attention(layer.qkv(x), batch, cache, index, self.config.num_heads)
        hidden = hidden + layer.out(attended)
        if not before:
            hidden = _norm(hidden, layer.attn_norm)
        x = _norm(hidden, layer.ffn_norm) if before else hidden
        hidden = hidden + layer.fc2(self._activation(layer.fc1(x)))
        return hidden if before else _norm(hidden, layer.ffn_norm)

    def propagate(self, first: int, hidden: torch.Tensor, slots: torch.Tensor, cache: KVCache) -> None:
        """State propagation (Elbayad et al. 2020): KV of the layers from `first` on, which exited rows skip.

        hidden: their states where they exited, [rows, hidden]; slots: [rows].
        """
        for index in range(first, self.depth):
            layer = self._layers[index]
            x = _norm(hidden, layer.attn_norm) if self.config.norm_before else hidden
            key_value = layer.qkv.from_channel(x, self.config.hidden_size)
            key, value = key_value.view(len(x), 2, self.config.num_heads, -1).unbind(1)
            cache.write(index, slots, key, value)

    def read_out(self, hidden: torch.Tensor, exit_layer: int) -> torch.Tensor:
        """Logits at the exit after `exit_layer` layers: [rows, hidden] -> [rows, vocabulary]."""
        head = self._exits.get(exit_layer, self._final)
        if head.norm is not None:
            hidden = _norm(hidden, head.norm)
        if head.linear is not None:
            hidden = head.linear(hidden)
        if self._project_out is not None:
            hidden = self._project_out(hidden)
        return self._lm_head(hidden)


def _norm(x: torch.Tensor, part: Norm) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], part.weight, part.bias)


def _attention(qkv: torch.Tensor, batch: Batch, cache: KVCache, layer: int, num_heads: int) -> torch.Tensor:
    """Stores the rows' KV, and each row looks at its own context: [T, 3 * hidden] -> [T, hidden]."""
    if reads_in_place(cache):
        return attend(qkv.float(), batch, cache, layer).to(qkv.dtype)
    # three times [T, heads, head_dim]
    query, key, value = qkv.view(len(qkv), 3, num_heads, -1).unbind(1)
    cache.write(layer, batch.slots, key, value)
    parts = []
    if batch.decode_rows:
        decode = slice(batch.decode_rows)
        # [rows, heads, context, head_dim]
        context_keys, context_values = (
            part.to(qkv.dtype) for part in cache.gather(layer, batch.decode_blocks)
        )
        attended = F.scaled_dot_product_attention(
            query[decode, :, None], context_keys, context_values, attn_mask=batch.decode_mask
        )
        parts.append(attended[:, :, 0])
    for chunk in batch.prefills:
        rows = slice(chunk.start, chunk.end)
        # [1, heads, rows or context, head_dim]
        if chunk.mask is None and cache.dtype == qkv.dtype:
            chunk_keys, chunk_values = key[rows].transpose(0, 1)[None], value[rows].transpose(0, 1)[None]
        else:
            # As they are kept: a chunk sees of itself what a later one will see of it.
            chunk_keys, chunk_values = (
                part.to(qkv.dtype) for part in cache.gather(layer, chunk.context_blocks)
            )
        attended = F.scaled_dot_product_attention(
            query[rows].transpose(0, 1)[None],
            chunk_keys,
            chunk_values,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
        )[0]
        parts.append(attended.transpose(0, 1))
    # [T, heads, head_dim] -> [T, hidden]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
