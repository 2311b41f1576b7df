"""Entries in Redis that cannot be read. They are ignored and reported, and the other entries are used."""

import logging
from collections import OrderedDict
from collections.abc import Mapping

from pydantic import ValidationError

# Most (entry, reason) pairs that are remembered as logged.
_REMEMBERED = 4096
_TOLD = 5


class IgnoredEntries:
    """Entries of one kind that repeated reads ignored. Logs each entry and reason once."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._now: Mapping[str, str] = {}

    def update(self, ignored: Mapping[str, str]) -> None:
        """Stores the entries that one read ignored, with their reasons."""
        self._now = ignored
        for entry, reason in ignored.items():
            self.note(entry, reason)

    def note(self, entry: str, reason: str) -> None:
        """Logs that an entry is ignored, unless that was logged before."""
        if (entry, reason) not in self._said:
            self._log.warning("%s is ignored: %s", entry, reason)
        self._said[entry, reason] = None
        self._said.move_to_end((entry, reason))
        if len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)

    def problems(self) -> list[str]:
        """Messages about the entries that the last read ignored. Contains only the first few."""
        said = [f"{entry} is ignored: {reason}" for entry, reason in self._now.items()]
        more = len(said) - _TOLD
        return said[:_TOLD] + ([f"{more} more entries are ignored; see the log"] if more > 0 else [])


def fault(error: Exception) -> str:
    """The first thing that is wrong with an unreadable entry, as text."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
