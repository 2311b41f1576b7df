"""The header of a GGUF file, read so that a file which lies about itself cannot make a reader run wild.

Format: github.com/ggml-org/ggml, docs/gguf.md. Every count, length and offset is checked against the file's
size and against the limits below, before anything is allocated for it. The `gguf` package trusts them.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import BinaryIO

from helios.errors import CheckpointError, SettingsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

# Real headers stay far below these limits: a vocabulary of 262,144 tokens makes 1.3 million items of arrays.
_MOST_ENTRIES = 1 << 16
_MOST_TENSORS = 1 << 16
_MOST_ITEMS = 1 << 21
_MOST_STRING_BYTES = 1 << 20
_MOST_NAME_BYTES = 1 << 10
_MOST_HEADER_BYTES = 1 << 28
_MOST_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9
# By the code of a value's type.
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_UINT32 = 4


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata. Its items are checked and not kept."""

    item_type: int
    length: int


Value = int | float | bool | str | GgufArray


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place in a GGUF file: bytes start..start + size of the file."""

    name: str
    shape: tuple[int, ...]  # like torch's: the last dimension is contiguous
    type_code: int  # gguf.GGMLQuantizationType
    start: int
    size: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata and the tensors of a GGUF file."""

    file: Path
    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]

    @classmethod
    def read(cls, file: Path) -> "GgufHeader":
        """The header of `file`.

        Raises CheckpointError naming the file and the field that is wrong; SettingsError without `gguf`.
        """
        try:
            import gguf  # noqa: F401, PLC0415
        except ImportError as error:
            raise SettingsError("reading a GGUF file needs gguf: install helios-serving[engine]") from error
        try:
            size = file.stat().st_size
            with file.open("rb") as stream:
                return _read(_Reader(stream, file, size))
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing; is this the right path?") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}); check the path") from error

    def error(self, field: str, problem: str) -> CheckpointError:
        """The error that says what is wrong with a field."""
        return CheckpointError(f"{self.file}: {field} {problem}")

    def text(self, key: str) -> str | None:
        """A string, None if it is absent."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"must be text, not {value!r}")
        return value

    def count(self, key: str) -> int | None:
        """A whole number of at least 1 that fits into 32 bits, None if it is absent."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
            raise self.error(key, f"must be a whole number of at least 1, not {value!r}")
        return value

    def number(self, key: str) -> float | None:
        """A finite number above 0, None if it is absent."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(key, f"must be a number above 0, not {value!r}")
        return float(value)


class _Reader:
    """Takes values off a file, and no byte beyond its end or beyond the limit of a header."""

    def __init__(self, stream: BinaryIO, file: Path, size: int) -> None:
        self._stream = stream
        self.file = file
        self.size = size
        self.position = 0
        self._items = 0

    def error(self, field: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {field} {problem}; fetch it again")

    def take(self, length: int, field: str) -> bytes:
        if length > self.size - self.position:
            raise self.error(field, f"reaches beyond the end of the file ({self.size} bytes)")
        self.position += length
        if self.position > _MOST_HEADER_BYTES:
            raise self.error(field, f"makes the header larger than {_MOST_HEADER_BYTES} bytes")
        found = self._stream.read(length)
        if len(found) != length:
            raise self.error(field, "is truncated")
        return found

    def number(self, form: str, field: str) -> int | float | bool:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form), field))
        return value  # type: ignore[no-any-return]

    def whole(self, form: str, field: str, most: int) -> int:
        value = int(self.number(form, field))
        if value > most:
            raise self.error(field, f"is {value}, and at most {most} are read")
        return value

    def string(self, field: str, most: int = _MOST_STRING_BYTES) -> str:
        length = self.whole("<Q", f"the length of {field}", most)
        try:
            return self.take(length, field).decode()
        except UnicodeDecodeError:
            raise self.error(field, "is not text in UTF-8") from None

    def value(self, key: str) -> Value:
        code = self.whole("<I", f"the type of {key}", (1 << 32) - 1)
        if code in _SCALARS:
            return self.number(_SCALARS[code], key)
        if code == _STRING:
            return self.string(key)
        if code == _ARRAY:
            return self._array(key)
        raise self.error(key, f"has the unknown type {code}")

    def _array(self, key: str) -> GgufArray:
        item_type = self.whole("<I", f"the type of {key}", (1 << 32) - 1)
        length = self.whole("<Q", f"the length of {key}", _MOST_ITEMS)
        self._items += length
        if self._items > _MOST_ITEMS:
            raise self.error(key, f"makes more than {_MOST_ITEMS} items of arrays")
        if item_type == _STRING:
            for _ in range(length):
                self.string(f"an item of {key}")
        elif item_type in _SCALARS:
            self.take(length * struct.calcsize(_SCALARS[item_type]), key)
        else:
            raise self.error(key, f"is an array of type {item_type}, which is not supported")
        return GgufArray(item_type, length)


def _read(reader: _Reader) -> GgufHeader:
    if reader.size < len(_MAGIC) or reader.take(len(_MAGIC), "the magic") != _MAGIC:
        raise CheckpointError(
            f"{reader.file} is not a GGUF file: it does not begin with GGUF; fetch it again"
        )
    version = reader.number("<I", "the version")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{reader.file}: version {version} of GGUF is not supported, only little-endian 2 and 3; fetch "
            "the model in another file"
        )
    tensor_count = reader.whole("<Q", "the number of tensors", _MOST_TENSORS)
    entry_count = reader.whole("<Q", "the number of metadata entries", _MOST_ENTRIES)
    metadata: dict[str, Value] = {}
    for _ in range(entry_count):
        key = reader.string("a metadata key", _MOST_NAME_BYTES)
        if key in metadata:
            raise reader.error(key, "is there twice")
        metadata[key] = reader.value(key)
    alignment = _DEFAULT_ALIGNMENT
    if (given := metadata.get("general.alignment")) is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 1 or given & (given - 1):
            raise reader.error("general.alignment", f"must be a power of two, not {given!r}")
        alignment = given
    tensors: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        tensor = _tensor(reader, alignment)
        if tensor.name in tensors:
            raise reader.error(tensor.name, "is there twice")
        tensors[tensor.name] = tensor
    begin = -(-reader.position // alignment) * alignment
    placed = tuple(
        GgufTensor(one.name, one.shape, one.type_code, begin + one.start, one.size)
        for one in tensors.values()
    )
    _check_places(reader, placed)
    return GgufHeader(reader.file, metadata, placed)


def _tensor(reader: _Reader, alignment: int) -> GgufTensor:
    """A tensor whose start is still counted from the begin of the tensors' data."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415

    name = reader.string("a tensor's name", _MOST_NAME_BYTES)
    dimensions = reader.whole("<I", f"the number of dimensions of {name}", _MOST_DIMENSIONS)
    # GGUF writes the contiguous dimension first.
    shape = tuple(reader.whole("<Q", f"a dimension of {name}", reader.size * 8) for _ in range(dimensions))[
        ::-1
    ]
    if not shape or 0 in shape:
        raise reader.error(name, f"has the shape {list(shape)}")
    code = reader.whole("<I", f"the type of {name}", (1 << 32) - 1)
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(code)]
    except (KeyError, ValueError):
        raise reader.error(name, f"has the unknown type {code}") from None
    if shape[-1] % block:
        raise reader.error(name, f"has rows of {shape[-1]}, and its type has blocks of {block}")
    start = reader.whole("<Q", f"the offset of {name}", (1 << 64) - 1)
    if start % alignment:
        raise reader.error(name, f"has the offset {start}, which is no multiple of {alignment}")
    return GgufTensor(name, shape, code, start, prod(shape) // block * block_bytes)


def _check_places(reader: _Reader, tensors: tuple[GgufTensor, ...]) -> None:
    """Every tensor lies inside the file, and none on another, so all are at most as large as the file."""
    ordered = sorted(tensors, key=lambda tensor: tensor.start)
    for tensor in ordered:
        if tensor.start + tensor.size > reader.size:
            raise CheckpointError(
                f"{reader.file} is truncated: it has {reader.size} bytes, and {tensor.name} ends at "
                f"{tensor.start + tensor.size}; fetch it again"
            )
    for before, after in pairwise(ordered):
        if before.start + before.size > after.start:
            raise reader.error(after.name, f"lies on {before.name}")
