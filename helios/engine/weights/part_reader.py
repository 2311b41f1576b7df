"""Reads the parts of a model from its checkpoint. Knows which tensors they are, and their shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from helios.architectures.architecture import TensorNames
from helios.architectures.registry import architecture_of
from helios.architectures.spec import ModelConfig
from helios.catalog import EarlyExitFacts
from helios.engine.weights.checkpoint import Checkpoint
from helios.engine.weights.parts import ExitHead, LayerWeights, LinearWeights, ModelWeights, Norm
from helios.engine.weights.quantize import has_groups, migrate_gammas, quantize_blocks, scale_columns
from helios.engine.weights.weight_files import CPU


def load_weights(
    path: Path,
    config: ModelConfig,
    facts: EarlyExitFacts,
    depth: int,
    dtype: torch.dtype,
    *,
    device: torch.device = CPU,
    exits: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelWeights:
    """The first `depth` layers of a checkpoint as tensors of `dtype`. No other weights are read.

    device: on torch's meta device everything is read and checked, and nothing is kept. exits: the exit layers
    to read out at (default: only `depth`). progress: called after each layer with the number of layers loaded
    and of all layers. Keeps nothing open afterwards and shares no state.

    Raises UnknownDepthError naming the valid depths, CheckpointError naming file and tensor,
    OutOfMemoryError.
    """
    wanted = (depth,) if exits is None else tuple(exits)
    facts.check_exits(wanted, depth, path.name)
    names = architecture_of(config).names
    with Checkpoint(path, names.prefixes) as checkpoint:
        reader = PartReader(checkpoint, config, names, dtype, device)
        embed_tokens = reader.embed_tokens()
        embed_positions = reader.embed_positions()
        project_in, project_out = reader.project_in(), reader.project_out()
        layers = []
        for index in range(depth):
            layers.append(reader.layer(index))
            if progress is not None:
                progress(index + 1, depth)
        own = [layer for layer in wanted if facts.has_own_head(layer)]
        return ModelWeights(
            embed_tokens=embed_tokens,
            embed_positions=embed_positions,
            project_in=project_in,
            project_out=project_out,
            layers=layers,
            final_norm=reader.final_norm() if len(own) < len(wanted) else None,
            exits={layer: reader.exit_head(facts, layer) for layer in own},
            lm_head=reader.lm_head(embed_tokens),
            bytes_read=checkpoint.bytes_read,
        )


@dataclass(frozen=True, slots=True)
class PartReader:
    """Reads the parts of a model in the shapes that its config requires. Raises as `Checkpoint.tensor`.

    names: names of the checkpoint's tensors. dtype: the type to read. is_quantized: weights of linear layers
    become int8 with scales while they are read, and embedding tables are kept in float16.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    names: TensorNames
    dtype: torch.dtype
    device: torch.device = CPU
    is_quantized: bool = False

    def embed_tokens(self) -> torch.Tensor:
        """[vocabulary, embed]."""
        return self._embedding(self.names.lm_head if self._is_only_head else self.names.embed_tokens)

    def embed_positions(self) -> torch.Tensor | None:
        """[offset + context, hidden]. None if positions are not learned."""
        if not self.config.position_rows:
            return None
        return self._table(self.names.embed_positions, self.config.position_rows, self.config.hidden_size)

    def project_in(self) -> LinearWeights | None:
        """Projection from the width of the embeddings to the hidden size. None where they are equal."""
        if not self.config.is_projected:
            return None
        return self._linear(self.names.project_in, self.config.hidden_size, self.config.embed_size)

    def project_out(self) -> LinearWeights | None:
        """Projection from the hidden size to the width of the embeddings. None where they are equal."""
        if not self.config.is_projected:
            return None
        return self._linear(self.names.project_out, self.config.embed_size, self.config.hidden_size)

    def lm_head(self, embed_tokens: torch.Tensor) -> torch.Tensor:
        """[vocabulary, embed], not quantised. It is the object embed_tokens when tied."""
        head, table = self.names.lm_head, self.names.embed_tokens
        if not self.config.tied_head:
            return self._embedding(head)
        if (
            self._is_only_head
            or not self._has(head)
            or self.checkpoint.is_alias(_weight(head), _weight(table))
        ):
            return embed_tokens
        lm_head = self._embedding(head)
        # Both tensors are stored. Like transformers 5, this treats them as tied only if they are equal.
        is_same = not lm_head.is_meta and torch.equal(lm_head, embed_tokens)
        return embed_tokens if is_same else lm_head

    def final_norm(self) -> Norm | None:
        """The model's final norm, if it has one."""
        if not self.config.has_final_norm:
            return None
        return self._own_norm(self.names.final_norm)

    def layer(self, index: int) -> LayerWeights:
        """One decoder layer, counted from 0."""
        config, names = self.config, self.names
        hidden, ffn = config.hidden_size, config.ffn_dim
        attn_norm = self._own_norm(names.attn_norm.format(index))
        ffn_norm = self._own_norm(names.ffn_norm.format(index))
        attn_columns = ffn_columns = None
        # A norm after a residual sum also feeds the next residual, so its weights cannot move. Groups of
        # inputs with scales of their own need no moving.
        if self.is_quantized and config.norm_before and not has_groups(config):
            attn_norm, attn_columns = migrate_gammas(attn_norm)
            ffn_norm, ffn_columns = migrate_gammas(ffn_norm)

        def into_attention(name: str, size: int) -> LinearWeights:
            return self._linear(
                name.format(index), size, hidden, has_bias=config.qkv_bias, columns=attn_columns
            )

        def into_ffn(name: str) -> LinearWeights:
            return self._linear(
                name.format(index), ffn, hidden, has_bias=config.ffn_bias, columns=ffn_columns
            )

        def head_norm(name: str) -> Norm | None:
            return self._head_norm(name.format(index)) if config.has_head_norm else None

        return LayerWeights(
            attn_norm=attn_norm,
            q=into_attention(names.q, config.query_size),
            k=into_attention(names.k, config.kv_size),
            v=into_attention(names.v, config.kv_size),
            q_norm=head_norm(names.q_norm),
            k_norm=head_norm(names.k_norm),
            out=self._linear(names.out.format(index), hidden, config.query_size, has_bias=config.out_bias),
            ffn_norm=ffn_norm,
            gate=into_ffn(names.gate) if config.is_gated else None,
            fc1=into_ffn(names.fc1),
            fc2=self._linear(names.fc2.format(index), hidden, ffn, has_bias=config.ffn_bias),
        )

    def exit_head(self, facts: EarlyExitFacts, layer: int) -> ExitHead:
        """The head of an exit that has its own. Its norm has the model's kind, and always has weights."""
        self.checkpoint.add_exits()
        hidden, linear = self.config.hidden_size, None
        norm = self._norm(f"exits.{layer}.norm", has_weight=True, has_bias=self.config.norm == "layer")
        if facts.exit_head == "linear":
            linear = self._linear(f"exits.{layer}.linear", hidden, hidden)
        return ExitHead(norm, linear)

    @property
    def _is_only_head(self) -> bool:
        """Whether tied weights are stored only under the head's name, as some writers do."""
        return (
            self.config.tied_head and self._has(self.names.lm_head) and not self._has(self.names.embed_tokens)
        )

    def _has(self, name: str) -> bool:
        return _weight(name) in self.checkpoint

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self.checkpoint.tensor(name, shape, self.dtype, self.device)

    def _table(self, name: str, rows: int, width: int) -> torch.Tensor:
        dtype = torch.float16 if self.is_quantized else self.dtype
        return self.checkpoint.tensor(_weight(name), (rows, width), dtype, self.device)

    def _embedding(self, name: str) -> torch.Tensor:
        return self._table(name, self.config.vocab_size, self.config.embed_size)

    def _linear(
        self,
        name: str,
        out_size: int,
        in_size: int,
        *,
        has_bias: bool = False,
        columns: torch.Tensor | None = None,
    ) -> LinearWeights:
        """columns: factors [in] by which the weight's columns are multiplied, where it is quantised."""
        scales, bias = None, f"{name}.bias"
        if not has_bias:
            self.checkpoint.check_absent(bias)
        if self.is_quantized:
            blocks = self.checkpoint.blocks(_weight(name), (out_size, in_size))
            if columns is not None:
                blocks = scale_columns(blocks, columns)
            weight, scales = quantize_blocks(blocks, out_size, in_size, in_groups=has_groups(self.config))
        else:
            weight = self._tensor(_weight(name), out_size, in_size)
        return LinearWeights(weight, self._tensor(bias, out_size) if has_bias else None, scales)

    def _own_norm(self, name: str) -> Norm:
        """A norm of the model itself, not of an exit's head."""
        return self._norm(name, has_weight=self.config.norm_affine, has_bias=self.config.has_norm_bias)

    def _head_norm(self, name: str) -> Norm:
        return Norm(self._tensor(_weight(name), self.config.head_dim), None)

    def _norm(self, name: str, *, has_weight: bool, has_bias: bool) -> Norm:
        hidden = self.config.hidden_size
        return Norm(
            self._tensor(_weight(name), hidden) if has_weight else None,
            self._tensor(f"{name}.bias", hidden) if has_bias else None,
        )


def _weight(name: str) -> str:
    return f"{name}.weight"
