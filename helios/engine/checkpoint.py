"""Reading a checkpoint: only the tensors that a partial model needs, into memory of their own."""

import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
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

# Makes int8 [out, in] and scales [out] of a weight [out, in].
Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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
    """An open weight file."""

    bytes_read: int

    @property
    def names(self) -> frozenset[str]:
        """Its tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        ...

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A copy that owns its memory. Raises CheckpointError, OutOfMemoryError."""
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
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.bytes_read = 0

    @property
    def names(self) -> frozenset[str]:
        """Its tensors."""
        return frozenset(self._slots)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._slots[name].shape

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A copy that owns its memory. Raises CheckpointError, OutOfMemoryError."""
        slot = self._slots[name]
        stored = _SAFETENSORS_DTYPES.get(slot.dtype)
        if stored is None:
            raise _unsupported(self._file, name, slot.dtype)
        tensor = _allocate(slot.shape, dtype, device)
        if not len(self._buffer):
            self._buffer = _allocate((_BUFFER_BYTES,), torch.uint8, _CPU)
        flat = tensor.view(-1)
        items = _BUFFER_BYTES // stored.itemsize
        self._stream.seek(slot.start)
        for start in range(0, len(flat), items):
            part = flat[start : start + items]
            raw = self._buffer[: len(part) * stored.itemsize]
            self._fill(raw, name)
            part.copy_(raw.view(stored))
        self.bytes_read += slot.end - slot.start
        return tensor

    def _fill(self, raw: torch.Tensor, name: str) -> None:
        view = raw.numpy().data
        while view:
            try:
                count = self._stream.readinto(view)
            except OSError as error:
                raise CheckpointError(f"{self._file} cannot be read at {name}: {error}") from error
            if not count:
                raise CheckpointError(f"{self._file} ends inside {name}; fetch it again")
            view = view[count:]

    def close(self) -> None:
        """Gives back the file."""
        self._stream.close()
        self._buffer = torch.empty(0, dtype=torch.uint8)


class PickleFile:
    """A pytorch_model.bin: mapped if it is a zip (torch 1.6 and later), else read as a whole.

    Only tensors are unpickled (`weights_only`), so a hostile file cannot run code.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tensors, self._mapped = _unpickle(file)
        self.bytes_read = 0 if self._mapped else file.stat().st_size

    @property
    def names(self) -> frozenset[str]:
        """Its tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A copy that owns its memory. Raises CheckpointError, OutOfMemoryError."""
        stored = self._tensors[name]
        if stored.dtype not in _SAFETENSORS_DTYPES.values():
            raise _unsupported(self._file, name, str(stored.dtype))
        tensor = _allocate(stored.shape, dtype, device)
        tensor.copy_(stored)
        if self._mapped:
            self.bytes_read += stored.nbytes
        return tensor

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

    Names are the decoder's (`layers.0.fc1.weight`), whatever prefix the export has. Files are opened
    when a tensor of theirs is asked for.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError naming the weight file that is missing or corrupt."""
        self.path = path
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
        """A tensor as `dtype` on `device`, in memory of its own.

        Raises CheckpointError naming file and tensor when it is missing, corrupt or of another shape,
        OutOfMemoryError when it does not fit.
        """
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
        return file.read(stored, dtype, device)

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
    quantize: Quantizer | None = None,
) -> ModelWeights:
    """The first `depth` layers of a checkpoint, and no byte more, as tensors of `dtype` on `device`.

    exits: the exit layers to read out at (default: only `depth`). progress: called with the layers
    loaded and the layers in all, after each. quantize: makes int8 [out, in] and scales [out] of each linear's
    weight as soon as it is read, and embeddings are kept in float16. Holds nothing open afterwards and
    shares no state, so a model loads beside a running one.

    Raises UnknownDepthError naming the valid depths, CheckpointError naming file and tensor,
    OutOfMemoryError.
    """
    wanted = (depth,) if exits is None else tuple(exits)
    for layer in (depth, *wanted):
        facts.check_depth(layer, path.name)
    if any(layer > depth for layer in wanted):
        raise ValueError(f"exits {wanted} reach beyond depth {depth}")
    with Checkpoint(path) as checkpoint:
        reader = _Reader(checkpoint, config, dtype, device, quantize)
        embed_tokens = reader.embedding(_EMBED_TOKENS)
        positions = config.context_tokens + POSITION_OFFSET
        embed_positions = reader.table("embed_positions.weight", positions, config.hidden_size)
        project_in = project_out = None
        if config.is_projected:
            project_in = reader.linear("project_in", config.hidden_size, config.embed_size, bias=False)
            project_out = reader.linear("project_out", config.embed_size, config.hidden_size, bias=False)
        layers = []
        for index in range(depth):
            layers.append(reader.layer(index))
            if progress is not None:
                progress(index + 1, depth)
        heads = reader.exit_heads(facts, wanted)
        needs_final_norm = config.has_final_norm and any(layer not in heads for layer in wanted)
        final_norm = reader.norm("final_layer_norm", affine=config.norm_affine) if needs_final_norm else None
        lm_head = reader.lm_head(embed_tokens)
        return ModelWeights(
            embed_tokens=embed_tokens,
            embed_positions=embed_positions,
            project_in=project_in,
            project_out=project_out,
            layers=layers,
            final_norm=final_norm,
            exits=heads,
            lm_head=lm_head,
            bytes_read=checkpoint.bytes_read,
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the parts of a model in the shapes that its config asks for."""

    checkpoint: Checkpoint
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    quantize: Quantizer | None

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self.checkpoint.tensor(name, shape, self.dtype, self.device)

    def table(self, name: str, *shape: int) -> torch.Tensor:
        dtype = self.dtype if self.quantize is None else torch.float16
        return self.checkpoint.tensor(name, shape, dtype, self.device)

    def embedding(self, name: str) -> torch.Tensor:
        return self.table(name, self.config.vocab_size, self.config.embed_size)

    def lm_head(self, embed_tokens: torch.Tensor) -> torch.Tensor:
        if not self.config.tied_head:
            return self.embedding(_LM_HEAD)
        if _LM_HEAD not in self.checkpoint or self.checkpoint.is_alias(_LM_HEAD, _EMBED_TOKENS):
            return embed_tokens
        # Stored twice: as in transformers 5, tied only if both are the same.
        lm_head = self.embedding(_LM_HEAD)
        return embed_tokens if torch.equal(lm_head, embed_tokens) else lm_head

    def linear(self, name: str, out_size: int, in_size: int, *, bias: bool) -> LinearWeights:
        weight, scales = self.tensor(f"{name}.weight", out_size, in_size), None
        if self.quantize is not None:
            weight, scales = self.quantize(weight)
        return LinearWeights(weight, self.tensor(f"{name}.bias", out_size) if bias else None, scales)

    def norm(self, name: str, *, affine: bool) -> Norm:
        if not affine:
            return Norm(None, None)
        hidden = self.config.hidden_size
        return Norm(self.tensor(f"{name}.weight", hidden), self.tensor(f"{name}.bias", hidden))

    def layer(self, index: int) -> LayerWeights:
        name = f"layers.{index}"
        hidden, ffn = self.config.hidden_size, self.config.ffn_dim
        bias, affine = self.config.has_bias, self.config.norm_affine
        return LayerWeights(
            attn_norm=self.norm(f"{name}.self_attn_layer_norm", affine=affine),
            q=self.linear(f"{name}.self_attn.q_proj", hidden, hidden, bias=bias),
            k=self.linear(f"{name}.self_attn.k_proj", hidden, hidden, bias=bias),
            v=self.linear(f"{name}.self_attn.v_proj", hidden, hidden, bias=bias),
            out=self.linear(f"{name}.self_attn.out_proj", hidden, hidden, bias=bias),
            ffn_norm=self.norm(f"{name}.final_layer_norm", affine=affine),
            fc1=self.linear(f"{name}.fc1", ffn, hidden, bias=bias),
            fc2=self.linear(f"{name}.fc2", hidden, ffn, bias=bias),
        )

    def exit_heads(self, facts: EarlyExitFacts, exits: Sequence[int]) -> dict[int, ExitHead]:
        # The last exit is the model's own read-out.
        early = [layer for layer in exits if layer != facts.num_layers]
        if facts.exit_head == "shared" or not early:
            return {}
        self.checkpoint.add_exits()
        heads = {}
        for layer in early:
            norm = self.norm(f"exits.{layer}.norm", affine=True)
            linear = None
            if facts.exit_head == "linear":
                hidden = self.config.hidden_size
                linear = self.linear(f"exits.{layer}.linear", hidden, hidden, bias=False)
            heads[layer] = ExitHead(norm, linear)
        return heads


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
