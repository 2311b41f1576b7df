"""The progress that the demo shows while it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.demo.timeline import Mark, Sample


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of the demo. `samples` and `marks` cover the run so far; times are in seconds."""

    stage: str
    seconds: float = 0.0
    total_seconds: float = 0.0
    samples: Sequence[Sample] = ()
    marks: Sequence[Mark] = ()


Show = Callable[[Progress], None]
