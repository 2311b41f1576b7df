"""Reading a checkpoint: only the tensors that a partial model needs, into memory of their own."""

import math
import os
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from helios.catalog import EXITS_FILE, FACTS_FILE, EarlyExitFacts
from helios.errors import CheckpointError, OutOfMemoryError
from helios.model_config import POSITION_OFFSET, ModelConfig
from helios.weight_map import WeightMap, read_safetensors_header

# Exports of OPTForCausalLM and of OPTModel; the LM head and the exits' tensors have no prefix.
_PREFIXES = ("model.decoder.", "decoder.", "")
_LM_HEAD = "lm_head.weight"
_EMBED_TOKENS = "embed_tokens.weight"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Reading goes through a buffer of this size, so that converting types never doubles a tensor.
_BUFFER_BYTES = 4 << 20
_CPU = torch.device("cpu")
# Of a weight whose columns are multiplied, so that little more memory is needed.
_ROWS_AT_ONCE = 64
# Of a norm's largest weight: smaller ones move no further into the product behind it.
_LEAST_SIZE = 1e-3

# Makes int8 [out, in] and scales [out] of a weight's rows, given in blocks [rows, in], and of its two sizes.
Quantizer = Callable[[Iterable[torch.Tensor], int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """y = x @ weight.T + bias. weight: [out, in], bias: [out].

    scales: [out]; given where weight is int8: its rows are to be multiplied by them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm, [hidden] each; both None where it has no parameters."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    attn_norm: Norm
    q: LinearWeights
    k: LinearWeights
    v: LinearWeights
    out: LinearWeights
    ffn_norm: Norm
    fc1: LinearWeights
    fc2: LinearWeights


@dataclass(frozen=True, slots=True)
class ExitHead:
    """An exit's own read-out, before project_out and the LM head. linear: [hidden, hidden], no bias."""

    norm: Norm
    linear: LinearWeights | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The first `len(layers)` layers of a model, and what reads tokens out of them."""

    embed_tokens: torch.Tensor  # [vocabulary, embed]
    embed_positions: torch.Tensor  # [context + 2, hidden]
    project_in: LinearWeights | None  # [hidden, embed]
    project_out: LinearWeights | None  # [embed, hidden]
    layers: list[LayerWeights]
    # None when the model has none, or every loaded exit has its own.
    final_norm: Norm | None
    # By exit layer; an exit that is not among them goes through final_norm.
    exits: dict[int, ExitHead]
    lm_head: torch.Tensor  # [vocabulary, embed]; the object embed_tokens when tied
    bytes_read: int  # of the checkpoint's files


class TensorFile(Protocol):
    """An open weight file, which several threads may read at once."""

    bytes_read: int

    @property
    def names(self) -> frozenset[str]:
        """Its tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        ...

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Some rows after the other, as they are stored; each valid until the next.

        Raises CheckpointError, OutOfMemoryError.
        """
        ...

    def close(self) -> None:
        """Gives back the file and what was mapped of it."""
        ...


class SafetensorsFile:
    """A safetensors file, read with plain reads.

    Not mapped: pages of a mapping count as resident beside the copies, and a file that shrinks under
    its mapping kills the process instead of raising an error.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._slots = read_safetensors_header(file)
        self._stream = file.open("rb", buffering=0)
        self._own = threading.local()
        self._lock = threading.Lock()
        self.bytes_read = 0

    @property
    def names(self) -> frozenset[str]:
        """Its tensors."""
        return frozenset(self._slots)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._slots[name].shape

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Some rows after the other, as they are stored; each valid until the next.

        Raises CheckpointError, OutOfMemoryError.
        """
        slot = self._slots[name]
        stored = _SAFETENSORS_DTYPES.get(slot.dtype)
        if stored is None:
            raise _unsupported(self._file, name, slot.dtype)
        rows, row_bytes = slot.shape[0], stored.itemsize * math.prod(slot.shape[1:])
        buffer, at_once = self._buffer(row_bytes), max(1, _BUFFER_BYTES // row_bytes)
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            raw = buffer[: count * row_bytes]
            self._fill(raw, slot.start + start * row_bytes, name)
            yield raw.view(stored).view(count, *slot.shape[1:])
        with self._lock:
            self.bytes_read += slot.end - slot.start

    def _buffer(self, row_bytes: int) -> torch.Tensor:
        """The calling thread's own, for a row at least."""
        found = getattr(self._own, "buffer", None)
        if not isinstance(found, torch.Tensor) or len(found) < row_bytes:
            found = self._own.buffer = _allocate((max(_BUFFER_BYTES, row_bytes),), torch.uint8, _CPU)
        return found

    def _fill(self, raw: torch.Tensor, offset: int, name: str) -> None:
        view = raw.numpy().data
        while view:
            try:
                count = os.preadv(self._stream.fileno(), [view], offset)
            except OSError as error:
                raise CheckpointError(f"{self._file} cannot be read at {name}: {error}") from error
            if not count:
                raise CheckpointError(f"{self._file} ends inside {name}; fetch it again")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Gives back the file."""
        self._stream.close()
        self._own = threading.local()


class PickleFile:
    """A pytorch_model.bin: mapped if it is a zip (torch 1.6 and later), else read as a whole.

    Only tensors are unpickled (`weights_only`), so a hostile file cannot run code.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._tensors, self._mapped = _unpickle(file)
        self.bytes_read = 0 if self._mapped else file.stat().st_size

    @property
    def names(self) -> frozenset[str]:
        """Its tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._tensors[name].shape)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Some rows after the other, as they are stored. Raises CheckpointError."""
        stored = self._tensors[name]
        if stored.dtype not in _SAFETENSORS_DTYPES.values():
            raise _unsupported(self._file, name, str(stored.dtype))
        yield from stored.split(max(1, _BUFFER_BYTES // stored[0].nbytes))
        if self._mapped:
            with self._lock:
                self.bytes_read += stored.nbytes

    def is_alias(self, name: str, other: str) -> bool:
        """Whether both names stand for the same stored bytes, as tied weights do."""
        one, two = self._tensors.get(name), self._tensors.get(other)
        if one is None or two is None:
            return False
        return one.data_ptr() == two.data_ptr() and one.shape == two.shape

    def close(self) -> None:
        """Gives back what was mapped or read of the file."""
        self._tensors = {}


class Checkpoint:
    """The weights of a model directory, read tensor by tensor. Use it in `with`, or close it.

    Several threads may read at once. Names are the decoder's (`layers.0.fc1.weight`), whatever prefix the
    export has. Files are opened when a tensor of theirs is asked for.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError naming the weight file that is missing or corrupt."""
        self.path = path
        self._lock = threading.Lock()
        self._open: dict[Path, TensorFile] = {}
        weights = WeightMap.read(path)
        if weights.file_of is None:
            file = weights.files[0]
            self._file_of: dict[str, Path] = dict.fromkeys(self._opened(file).names, file)
        else:
            self._file_of = dict(weights.file_of)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far; a pickle of the old format counts as a whole."""
        return sum(file.bytes_read for file in self._open.values())

    def add_exits(self) -> None:
        """Makes the exit heads' tensors readable too. Raises CheckpointError when their file is not."""
        file = self.path / EXITS_FILE
        if not file.is_file():
            raise CheckpointError(f"{file} is missing though {FACTS_FILE} says exits have heads; fetch it")
        self._file_of.update(dict.fromkeys(self._opened(file).names, file))

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = _CPU
    ) -> torch.Tensor:
        """A tensor as `dtype` on `device`, in memory of its own. On torch's device meta it is read, not kept.

        Raises CheckpointError naming file and tensor when it is missing, corrupt, of another shape or holds
        a number that `dtype` cannot, NaN and infinity among them; OutOfMemoryError when it does not fit.
        """
        blocks, row = self.blocks(name, shape, dtype), 0
        tensor = _allocate(shape, dtype, device)
        for block in blocks:
            tensor[row : row + len(block)].copy_(block)
            row += len(block)
        return tensor

    def blocks(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Iterator[torch.Tensor]:
        """A tensor, some rows after the other as they are stored; each valid until the next.

        All numbers are finite in `dtype`. Raises as `tensor`.
        """
        file, stored = self._found(name, shape)
        return _finite(file.blocks(stored), dtype, f"{self._file_of[stored]}: {stored}")

    def _found(self, name: str, shape: tuple[int, ...]) -> tuple[TensorFile, str]:
        """The file that has a tensor, and its name there."""
        stored = self._stored_name(name)
        if stored is None:
            where = ", ".join(sorted({file.name for file in self._file_of.values()}))
            raise CheckpointError(f"{self.path} has no tensor {name} (looked in {where}); fetch it again")
        path = self._file_of[stored]
        file = self._opened(path)
        if stored not in file.names:
            raise CheckpointError(f"{path} lacks {stored} though the index says it is there; fetch it again")
        if file.shape(stored) != shape:
            raise CheckpointError(
                f"{path}: {stored} has shape {list(file.shape(stored))} where config.json asks for "
                f"{list(shape)}; config.json and weights are not of one model"
            )
        return file, stored

    def is_alias(self, name: str, other: str) -> bool:
        """Whether a pickle stores both tensors as one."""
        stored, twin = self._stored_name(name), self._stored_name(other)
        if stored is None or twin is None or self._file_of[stored] != self._file_of[twin]:
            return False
        file = self._opened(self._file_of[stored])
        return isinstance(file, PickleFile) and file.is_alias(stored, twin)

    def close(self) -> None:
        """Gives back every file; `bytes_read` stays."""
        for file in self._open.values():
            file.close()

    def _stored_name(self, name: str) -> str | None:
        return next((prefix + name for prefix in _PREFIXES if prefix + name in self._file_of), None)

    def _opened(self, file: Path) -> TensorFile:
        with self._lock:
            if file not in self._open:
                kind = SafetensorsFile if file.suffix == ".safetensors" else PickleFile
                self._open[file] = kind(file)
            return self._open[file]


def load_weights(
    path: Path,
    config: ModelConfig,
    facts: EarlyExitFacts,
    depth: int,
    dtype: torch.dtype,
    *,
    device: torch.device = _CPU,
    exits: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelWeights:
    """The first `depth` layers of a checkpoint, and no byte more, as tensors of `dtype`.

    device: on torch's device meta all is read and checked, and nothing is kept. exits: the exit layers to
    read out at (default: only `depth`). progress: called with the layers loaded and the layers in all, after
    each. Holds nothing open afterwards and shares no state.

    Raises UnknownDepthError naming the valid depths, CheckpointError naming file and tensor,
    OutOfMemoryError.
    """
    wanted = (depth,) if exits is None else tuple(exits)
    check_depths(facts, depth, wanted, path.name)
    with Checkpoint(path) as checkpoint:
        reader = PartReader(checkpoint, config, dtype, device)
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


def check_depths(facts: EarlyExitFacts, depth: int, exits: Sequence[int], name: str) -> None:
    """Raises UnknownDepthError naming the valid depths, ValueError for exits beyond the depth."""
    for layer in (depth, *exits):
        facts.check_depth(layer, name)
    if any(layer > depth for layer in exits):
        raise ValueError(f"exits {exits} reach beyond depth {depth}")


@dataclass(frozen=True, slots=True)
class PartReader:
    """Reads the parts of a model in the shapes that its config asks for. Raises as `Checkpoint.tensor`.

    quantize: makes int8 [out, in] and scales [out] of each linear's weight while it is read, and embeddings
    are kept in float16.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device = _CPU
    quantize: Quantizer | None = None

    def embed_tokens(self) -> torch.Tensor:
        """[vocabulary, embed]."""
        return self._embedding(_LM_HEAD if self._is_only_head else _EMBED_TOKENS)

    def embed_positions(self) -> torch.Tensor:
        """[context + 2, hidden]."""
        positions = self.config.context_tokens + POSITION_OFFSET
        return self._table("embed_positions.weight", positions, self.config.hidden_size)

    def project_in(self) -> LinearWeights | None:
        """Where embeddings have another width."""
        if not self.config.is_projected:
            return None
        return self._linear("project_in", self.config.hidden_size, self.config.embed_size, bias=False)

    def project_out(self) -> LinearWeights | None:
        """Where embeddings have another width."""
        if not self.config.is_projected:
            return None
        return self._linear("project_out", self.config.embed_size, self.config.hidden_size, bias=False)

    def lm_head(self, embed_tokens: torch.Tensor) -> torch.Tensor:
        """[vocabulary, embed], not quantised; the object embed_tokens when tied."""
        if not self.config.tied_head:
            return self._embedding(_LM_HEAD)
        if (
            self._is_only_head
            or _LM_HEAD not in self.checkpoint
            or self.checkpoint.is_alias(_LM_HEAD, _EMBED_TOKENS)
        ):
            return embed_tokens
        lm_head = self._embedding(_LM_HEAD)
        # Stored twice: as in transformers 5, tied only if both are the same.
        is_same = not lm_head.is_meta and torch.equal(lm_head, embed_tokens)
        return embed_tokens if is_same else lm_head

    @property
    def _is_only_head(self) -> bool:
        """Whether tied weights are stored under the head's name alone: the writer chooses which one stays."""
        return self.config.tied_head and _LM_HEAD in self.checkpoint and _EMBED_TOKENS not in self.checkpoint

    def final_norm(self) -> Norm | None:
        """The model's own, where it has one."""
        if not self.config.has_final_norm:
            return None
        return self._norm("final_layer_norm", affine=self.config.norm_affine)

    def layer(self, index: int) -> LayerWeights:
        """One decoder layer, counted from 0."""
        name = f"layers.{index}"
        hidden, ffn = self.config.hidden_size, self.config.ffn_dim
        bias, affine = self.config.has_bias, self.config.norm_affine
        attn_norm = self._norm(f"{name}.self_attn_layer_norm", affine=affine)
        ffn_norm = self._norm(f"{name}.final_layer_norm", affine=affine)
        attn_moved = ffn_moved = None
        # Behind a residual sum a norm is read by more than the next product.
        if self.quantize is not None and self.config.norm_before:
            attn_norm, attn_moved = _evened(attn_norm)
            ffn_norm, ffn_moved = _evened(ffn_norm)
        return LayerWeights(
            attn_norm=attn_norm,
            q=self._linear(f"{name}.self_attn.q_proj", hidden, hidden, bias=bias, columns=attn_moved),
            k=self._linear(f"{name}.self_attn.k_proj", hidden, hidden, bias=bias, columns=attn_moved),
            v=self._linear(f"{name}.self_attn.v_proj", hidden, hidden, bias=bias, columns=attn_moved),
            out=self._linear(f"{name}.self_attn.out_proj", hidden, hidden, bias=bias),
            ffn_norm=ffn_norm,
            fc1=self._linear(f"{name}.fc1", ffn, hidden, bias=bias, columns=ffn_moved),
            fc2=self._linear(f"{name}.fc2", hidden, ffn, bias=bias),
        )

    def exit_head(self, facts: EarlyExitFacts, layer: int) -> ExitHead:
        """The head of an exit that has its own."""
        self.checkpoint.add_exits()
        norm, linear = self._norm(f"exits.{layer}.norm", affine=True), None
        if facts.exit_head == "linear":
            hidden = self.config.hidden_size
            linear = self._linear(f"exits.{layer}.linear", hidden, hidden, bias=False)
        return ExitHead(norm, linear)

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self.checkpoint.tensor(name, shape, self.dtype, self.device)

    def _table(self, name: str, *shape: int) -> torch.Tensor:
        dtype = self.dtype if self.quantize is None else torch.float16
        return self.checkpoint.tensor(name, shape, dtype, self.device)

    def _embedding(self, name: str) -> torch.Tensor:
        return self._table(name, self.config.vocab_size, self.config.embed_size)

    def _linear(
        self, name: str, out_size: int, in_size: int, *, bias: bool, columns: torch.Tensor | None = None
    ) -> LinearWeights:
        """columns: factors of the weight's columns [in], where it is quantised."""
        scales = None
        if self.quantize is None:
            weight = self._tensor(f"{name}.weight", out_size, in_size)
        else:
            blocks = self.checkpoint.blocks(f"{name}.weight", (out_size, in_size))
            if columns is not None:
                parts = (part for block in blocks for part in block.split(_ROWS_AT_ONCE))
                blocks = (part.float() * columns for part in parts)
            weight, scales = self.quantize(blocks, out_size, in_size)
        return LinearWeights(weight, self._tensor(f"{name}.bias", out_size) if bias else None, scales)

    def _norm(self, name: str, *, affine: bool) -> Norm:
        if not affine:
            return Norm(None, None)
        hidden = self.config.hidden_size
        return Norm(self._tensor(f"{name}.weight", hidden), self._tensor(f"{name}.bias", hidden))


def _evened(norm: Norm) -> tuple[Norm, torch.Tensor | None]:
    """A norm whose channels differ less, and what the columns of the product behind it are multiplied by.

    Its largest channels decide how coarsely a row of its output is rounded. They move into the weights (gamma
    migration, Wei et al. 2022), by half, in the exponent: weights are rounded, too.
    """
    if norm.weight is None or norm.bias is None:
        return norm, None
    sizes = norm.weight.abs().float()
    moved = sizes.clamp_min(_LEAST_SIZE * sizes.max().item()).sqrt()
    if not moved.all():
        return norm, None
    return Norm(norm.weight / moved, norm.bias / moved), moved


def _finite(blocks: Iterable[torch.Tensor], dtype: torch.dtype, name: str) -> Iterator[torch.Tensor]:
    """The blocks, as long as all their numbers are finite in `dtype`. name: of file and tensor."""
    limit = torch.finfo(dtype).max
    for block in blocks:
        # NaN if any number is.
        low, high = (extreme.item() for extreme in torch.aminmax(block))
        if not -limit <= low <= high <= limit:
            if math.isfinite(low) and math.isfinite(high):
                raise CheckpointError(
                    f"{name} holds numbers from {low:g} to {high:g}, and {dtype} ends at {limit:g}; choose "
                    "another precision"
                )
            raise CheckpointError(
                f"{name} holds NaN or infinite numbers, with which no token can be computed; fetch the model "
                "again, or get an earlier checkpoint of it"
            )
        yield block


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    except RuntimeError as error:
        raise OutOfMemoryError(
            f"no memory for a tensor of shape {list(shape)} as {dtype} on {device}; "
            "load fewer layers or a smaller model"
        ) from error


def _unsupported(file: Path, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {name} is stored as {dtype}; Helios reads float32, float16, bfloat16 and float64 weights"
    )


def _unpickle(file: Path) -> tuple[Mapping[str, torch.Tensor], bool]:
    """The tensors of a pickle, and whether they are mapped."""
    try:
        mapped = zipfile.is_zipfile(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; fetch it") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is corrupt, or holds Python objects beside tensors; it was not loaded, since these "
            "could run code. Get the model as safetensors, or fetch it again"
        ) from error
    # Damaged bytes can make the unpickler raise nearly anything.
    except Exception as error:
        raise CheckpointError(f"{file} is corrupt or truncated ({error}); fetch it again") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{file} does not map names to tensors; fetch it again")
    return tensors, mapped
