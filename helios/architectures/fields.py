"""Checked access to the fields of config.json."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

from helios.architectures.spec import Dtype
from helios.errors import CheckpointError

_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a JSON object. Methods raise CheckpointError naming file and field when one is wrong.

    file: used only in errors. prefix: before the names in errors, for an object inside the file's object.
    """

    values: dict[str, Any]
    file: Path
    prefix: str = ""

    def error(self, name: str, problem: str) -> CheckpointError:
        """The error that says what is wrong with a field."""
        return CheckpointError(f"{self.file}: {self.prefix}{name} {problem}")

    def inside(self, name: str) -> Self:
        """The fields of an object inside this one. Empty if the field is absent or null."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {value!r}")
        return replace(self, values=value, prefix=f"{self.prefix}{name}.")

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1. default: if the field is absent or null; None: it must be there."""
        value = default if self.values.get(name) is None else self.values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, f"must be a whole number of at least 1, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0. default: if the field is absent or null; None: it must be there."""
        value = default if self.values.get(name) is None else self.values[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(name, f"must be a number above 0, not {value!r}")
        return float(value)

    def dtype(self) -> Dtype:
        """The type of the weights. transformers 5 writes `dtype`, older versions `torch_dtype`."""
        name = "dtype" if self.values.get("dtype") else "torch_dtype"
        return cast("Dtype", self.choice(name, _DTYPES, self.values.get(name) or "float32"))

    def switch(self, name: str, default: bool) -> bool:
        """A Boolean, true or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def choice(self, name: str, choices: tuple[str, ...], value: object) -> str:
        """`value`, which must be one of the choices."""
        if value not in choices:
            raise self.error(name, f"is {value!r}; supported: {', '.join(choices)}")
        return str(value)

    def tokens(self, name: str, default: int | None, vocab_size: int) -> tuple[int, ...]:
        """One token id, or a list of them. Empty if the field is null."""
        value = self.values.get(name, default)
        items = value if isinstance(value, list) else [value]
        found = (self._token(name, item, vocab_size) for item in items)
        return tuple(token for token in found if token is not None)

    def token(self, name: str, default: int | None, vocab_size: int) -> int | None:
        """One token id. None if the field is null."""
        return self._token(name, self.values.get(name, default), vocab_size)

    def _token(self, name: str, value: object, vocab_size: int) -> int | None:
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise self.error(name, f"must be an id of the vocabulary ({vocab_size} tokens), not {value!r}")
        return value
