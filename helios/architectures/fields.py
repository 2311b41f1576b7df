"""Checked access to the fields of config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a JSON object. Methods raise CheckpointError naming file and field when one is wrong.

    file: used only in errors.
    """

    values: dict[str, Any]
    file: Path

    def error(self, name: str, problem: str) -> CheckpointError:
        """The error that says what is wrong with a field."""
        return CheckpointError(f"{self.file}: {name} {problem}")

    def size(self, name: str) -> int:
        """A whole number of at least 1."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, f"must be a whole number of at least 1, not {value!r}")
        return value

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
