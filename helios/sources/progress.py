"""What a pull tells of its way."""

from collections.abc import Callable

# (what is done, bytes done, all bytes)
Progress = Callable[[str, int, int], None]


def say_nothing(what: str, done: int, total: int) -> None:
    """Progress for callers that do not want any."""
