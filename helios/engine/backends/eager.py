"""The first layers of a model over paged KV, as one torch operation after the other.

Linear layers hide the precision in which they compute.
"""

import itertools
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from helios.architectures.spec import LearnedPositions, ModelConfig
from helios.engine.backends.burst import ONE_STEP, Burst
from helios.engine.backends.kv_cache import KVCache
from helios.engine.backends.paged_attention import attend, attends_in_place
from helios.engine.backends.readout import Readout, read, read_on_device
from helios.engine.scheduling.batch import Batch
from helios.engine.weights.linear import PackedLinear
from helios.engine.weights.packed_weights import Head, PackedWeights, parted
from helios.engine.weights.parts import Norm

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class EagerModel:
    """Computes embeddings, layers and exit heads with torch. Packed linear layers use their own kernel."""

    def __init__(self, config: ModelConfig, weights: PackedWeights, block_tokens: int) -> None:
        """block_tokens: tokens per block of the caches that it will use."""
        self._config, self._layers = config, weights.layers
        ends = weights.ends
        device = ends.device
        # Packed products take and return float32, so everything else is float32 too.
        is_packed = isinstance(ends.lm_head, PackedLinear)
        # Type of activations.
        self.dtype = torch.float32 if is_packed else ends.lm_head.tensors[0].dtype
        # None: the embeddings are the rows of the LM head.
        self._embed_tokens, self._embed_positions = ends.embed_tokens, ends.embed_positions
        self._rotation = ends.rotation
        self._project_in, self._project_out, self._lm_head = ends.project_in, ends.project_out, ends.lm_head
        self._final = weights.final or Head(None, None)
        self._exits = weights.exits
        self._activation = _ACTIVATIONS[config.activation]
        self._head_counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        in_place = attends_in_place(config, device, block_tokens)
        self._attention = _attend_in_place if in_place else _attend_to_gathered
        self._read = read if device.type == "cpu" else read_on_device

    def step(self, batch: Batch, cache: KVCache, depth: int, _burst: Burst = ONE_STEP) -> Readout:
        """Reads out the batch's read rows after the first `depth` layers. Writes the KV of all rows.

        Takes one step and draws no tokens; callers pass no other burst.
        """
        return self.step_with_states(batch, cache, depth)[0]

    def step_with_states(self, batch: Batch, cache: KVCache, depth: int) -> tuple[Readout, torch.Tensor]:
        """Like `step`. Also returns the states of all rows after these layers: [T, hidden]."""
        hidden = self.layers(self.embed(batch.token_ids, batch.positions), batch, cache, 0, depth)
        # read_rows is ascending, so if there are as many reads as rows, every row is read.
        read = hidden if batch.reads == batch.rows else hidden[batch.read_rows]
        return self._read(self.read_out(read, depth)), hidden

    def step_dynamic(
        self, batch: Batch, cache: KVCache, thresholds: Mapping[int, float], _burst: Burst = ONE_STEP
    ) -> tuple[Readout, list[int]]:
        """Each decode row leaves at its first confident exit. The batch continues with the others.

        Prefill rows go through all layers. The KV of layers that a row skips is computed from its state at
        the exit (state propagation, EE-LLM, Chen et al. 2024). `thresholds` maps each exit before the last to
        the confidence that it requires. Returns the readout of the read rows and the exit layer of each.
        Takes one step, like `step`.
        """
        depth = len(self._layers)
        hidden = self.embed(batch.token_ids, batch.positions)
        # Decode rows that have not left. `hidden` and `running` hold these rows, followed by the prefill
        # rows.
        active = torch.arange(batch.decode_rows, device=hidden.device)
        running = batch
        exit_layers = torch.full((len(batch.read_rows),), depth, device=hidden.device)
        exited: list[tuple[torch.Tensor, Readout]] = []  # (rows, their readout)
        stops = sorted(layer for layer in thresholds if layer < depth)
        for first, last in itertools.pairwise((0, *stops, depth)):
            hidden = self.layers(hidden, running, cache, first, last)
            if last == depth or not len(active):
                continue
            found = self._read(self.read_out(hidden[: len(active)], last))
            leaves = found.confidences >= thresholds[last]
            if not bool(leaves.any()):
                continue
            rows = active[leaves]
            exited.append((rows, found.rows(leaves)))
            exit_layers[rows] = last
            self._propagate(
                last, hidden[: len(active)][leaves], batch.slots[rows], batch.positions[rows], cache
            )
            hidden = torch.cat([hidden[: len(active)][~leaves], hidden[len(active) :]])
            active = active[~leaves]
            if not len(hidden):
                break
            running = batch.with_decode_rows(active)
        # Decode rows come first and every one is read, so decode row i is also read i.
        remaining = (exit_layers == depth).nonzero()[:, 0]
        if len(remaining) or not exited:
            prefilled = batch.read_rows[batch.decode_rows :] - (batch.decode_rows - len(active))
            at = torch.cat([torch.arange(len(active), device=hidden.device), prefilled])
            exited.append((remaining, self._read(self.read_out(hidden[at], depth))))
        order = torch.cat([rows for rows, _ in exited]).argsort()
        return Readout.joined([found for _, found in exited], order), exit_layers.tolist()

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer: [T] -> [T, hidden]."""
        if self._embed_tokens is None:
            hidden = self._lm_head.weights_of(token_ids).to(self.dtype)
        else:
            hidden = F.embedding(token_ids, self._embed_tokens).to(self.dtype)
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        learned = self._config.positions
        if self._embed_positions is None or not isinstance(learned, LearnedPositions):
            return hidden
        return hidden + F.embedding(positions + learned.offset, self._embed_positions)

    def layers(
        self, hidden: torch.Tensor, batch: Batch, cache: KVCache, first: int, last: int
    ) -> torch.Tensor:
        """Runs the layers first..last: [T, hidden] -> [T, hidden]. Writes the rows' KV."""
        for index in range(first, last):
            hidden = self._layer(index, hidden, batch, cache)
        return hidden

    def read_out(self, hidden: torch.Tensor, exit_layer: int) -> torch.Tensor:
        """Logits at the exit after `exit_layer` layers: [rows, hidden] -> [rows, vocabulary]."""
        head = self._exits.get(exit_layer, self._final)
        if head.norm is not None:
            hidden = self._norm(hidden, head.norm)
        if head.linear is not None:
            hidden = head.linear(hidden)
        if self._project_out is not None:
            hidden = self._project_out(hidden)
        return self._lm_head(hidden)

    def _layer(self, index: int, hidden: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        layer = self._layers[index]
        before = self._config.norm_before
        x = self._norm(hidden, layer.attn_norm) if before else hidden
        # Each is [T, heads, head_dim].
        query, key, value = self._heads(layer.qkv(x)).split(self._head_counts, dim=1)
        query = self._placed(query, layer.q_norm, batch.positions)
        key = self._placed(key, layer.k_norm, batch.positions)
        hidden = hidden + layer.out(self._attention(query, key, value, batch, cache, index))
        if not before:
            hidden = self._norm(hidden, layer.attn_norm)
        x = self._norm(hidden, layer.ffn_norm) if before else hidden
        hidden = hidden + layer.fc2(self._activated(layer.fc1(x)))
        return hidden if before else self._norm(hidden, layer.ffn_norm)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads * head_dim] -> [T, heads, head_dim]."""
        return x.view(len(x), -1, self._config.head_dim)

    def _placed(self, x: torch.Tensor, norm: Norm | None, positions: torch.Tensor) -> torch.Tensor:
        """Queries or keys after their norm and rotation: [T, heads, head_dim] at positions [T]."""
        if norm is not None:
            x = self._norm(x, norm)
        if self._rotation is None:
            return x
        # [T, 1, head_dim / 2]
        cosines, sines = self._rotation[positions, None].to(x.dtype).chunk(2, dim=-1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        """The input of fc2: [T, channels of fc1] -> [T, ffn]."""
        if not self._config.is_gated:
            return self._activation(x)
        gate, up = parted(x, self._config.ffn_dim)
        return self._activation(gate) * up

    def _norm(self, x: torch.Tensor, part: Norm) -> torch.Tensor:
        """Normalises the last dimension."""
        epsilon = self._config.norm_epsilon
        if self._config.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], part.weight, part.bias, epsilon)
        # Like in transformers, the result has the activations' type before it is multiplied by the weight.
        normed = F.rms_norm(x.float(), x.shape[-1:], None, epsilon).to(x.dtype)
        return normed if part.weight is None else part.weight * normed

    def _propagate(
        self, first: int, hidden: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, cache: KVCache
    ) -> None:
        """State propagation (Elbayad et al. 2020): KV of the layers from `first` on, which exited rows skip.

        hidden: the rows' states at their exit, [rows, hidden]; slots, positions: [rows].
        """
        for index in range(first, len(self._layers)):
            layer = self._layers[index]
            x = self._norm(hidden, layer.attn_norm) if self._config.norm_before else hidden
            key_value = self._heads(layer.qkv.from_channel(x, self._config.query_size))
            key, value = key_value.chunk(2, dim=1)
            cache.write(index, slots, self._placed(key, layer.k_norm, positions), value)


def _attend_in_place(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, cache: KVCache, layer: int
) -> torch.Tensor:
    """`paged_attention.attend` for activations of any type. Arguments: as in `_attend_to_gathered`."""
    qkv = torch.cat([query, key, value], dim=1).flatten(1).float()
    return attend(qkv, batch, cache, layer).to(query.dtype)


def _attend_to_gathered(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, cache: KVCache, layer: int
) -> torch.Tensor:
    """Stores the rows' KV. Then each row attends to a copy of its context.

    query: [T, heads, head_dim]; key, value: [T, KV heads, head_dim]. Returns [T, heads * head_dim].
    """
    cache.write(layer, batch.slots, key, value)
    # Each KV head serves a group of query heads.
    grouped = query.shape[1] != key.shape[1]
    parts = []
    if batch.decode_rows:
        decode = slice(batch.decode_rows)
        # [rows, heads, context, head_dim]
        context_keys, context_values = (
            part.to(query.dtype) for part in cache.gather(layer, batch.decode_blocks)
        )
        attended = F.scaled_dot_product_attention(
            query[decode, :, None],
            context_keys,
            context_values,
            attn_mask=batch.decode_mask,
            enable_gqa=grouped,
        )
        parts.append(attended[:, :, 0])
    for chunk in batch.prefills:
        rows = slice(chunk.start, chunk.end)
        # [1, heads, rows or context, head_dim]
        if chunk.mask is None and cache.dtype == query.dtype:
            chunk_keys, chunk_values = key[rows].transpose(0, 1)[None], value[rows].transpose(0, 1)[None]
        else:
            # Read back from the cache, so that the chunk sees its own tokens exactly as later chunks will see
            # them.
            chunk_keys, chunk_values = (
                part.to(query.dtype) for part in cache.gather(layer, chunk.context_blocks)
            )
        attended = F.scaled_dot_product_attention(
            query[rows].transpose(0, 1)[None],
            chunk_keys,
            chunk_values,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=grouped,
        )[0]
        parts.append(attended.transpose(0, 1))
    # [T, heads, head_dim] -> [T, heads * head_dim]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
