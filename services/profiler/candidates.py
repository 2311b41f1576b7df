"""Candidates stay loaded between evaluations, so that a reassessment reads no weights."""

import logging
from collections.abc import Sequence

from helios.catalog import ModelEntry, checkpoint_id
from helios.engine.evaluation.candidate import Candidate, load_candidate, needed_bytes
from helios.engine.evaluation.settings import EvaluationSettings
from helios.errors import OutOfMemoryError

log = logging.getLogger(__name__)


class Candidates:
    """Loaded models: as many as fit into the budget beside the one being evaluated. Used by one thread."""

    def __init__(self, settings: EvaluationSettings, budget: int) -> None:
        """budget: bytes for the weights of all models and the KV of one."""
        self._settings = settings
        self._budget = budget
        # By name. The least recently evaluated comes first.
        self._kept: dict[str, Candidate] = {}

    @property
    def names(self) -> list[str]:
        """Names of the loaded models."""
        return list(self._kept)

    def take(self, entry: ModelEntry, prompts: Sequence[Sequence[int]]) -> tuple[Candidate, bool]:
        """The model, and whether it had to be loaded now. Removes others if it needs their memory.

        Raises OutOfMemoryError, before anything is loaded, if the model alone exceeds the budget;
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
            # Releases the old files' weights before the new files' weights are loaded.
            candidate = None
            candidate = load_candidate(entry, self._settings)
        self._kept[entry.name] = candidate
        return candidate, is_fresh
