"""The candidates that stay loaded between evaluations, so that a reassessment reads no weights."""

import logging
from collections.abc import Sequence

from helios.catalog import ModelEntry, checkpoint_id
from helios.engine.evaluation.candidate import Candidate, load_candidate, needed_bytes
from helios.engine.evaluation.settings import EvaluationSettings
from helios.errors import OutOfMemoryError

log = logging.getLogger(__name__)


class Candidates:
    """Loaded models: as many as the budget holds beside the one that is being evaluated. For one thread."""

    def __init__(self, settings: EvaluationSettings, budget: int) -> None:
        """budget: bytes for the weights of all and the KV of one."""
        self._settings = settings
        self._budget = budget
        # By name. The one that was evaluated longest ago comes first.
        self._kept: dict[str, Candidate] = {}

    @property
    def names(self) -> list[str]:
        """Those that are loaded."""
        return list(self._kept)

    def take(self, entry: ModelEntry, prompts: Sequence[Sequence[int]]) -> tuple[Candidate, bool]:
        """The loaded model, and whether it had to be loaded now. Others go where it needs their memory.

        Raises OutOfMemoryError, before anything is loaded, when the model exceeds the budget alone;
        InvalidRequestError for prompts that it cannot run; CheckpointError naming the file.
        """
        needed = needed_bytes(entry, prompts, self._settings)
        if needed > self._budget:
            raise OutOfMemoryError(
                f"{entry.name} needs about {needed:,} bytes to be evaluated, the budget is {self._budget:,}; "
                "raise memory_bytes, or evaluate on a larger machine"
            )
        candidate = self._kept.pop(entry.name, None)
        while needed + sum(one.model.weight_bytes for one in self._kept.values()) > self._budget:
            gone = next(iter(self._kept))
            del self._kept[gone]
            log.info("%s is no longer kept loaded: %s needs its memory", gone, entry.name)
        is_fresh = candidate is None or candidate.checkpoint != checkpoint_id(entry)
        if candidate is None or is_fresh:
            # The old files' weights are given back before the new files' weights are loaded.
            candidate = None
            candidate = load_candidate(entry, self._settings)
        self._kept[entry.name] = candidate
        return candidate, is_fresh
